"""Joint measurements of all nodes: clock offsets, and the bandwidth of an all-reduce."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PING_PONGS = 5
REPETITIONS = 5
# Large enough that bandwidth dominates latency, and on a CPU small enough to take about a second.
BYTES = {"nccl": 256 * 2**20, "gloo": 8 * 2**20}


def node_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs of nodes. Pairs are neighbours on a ring, so that each node is paired with two others.

    Two nodes give one pair; one node gives none.
    """
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    edges = [(node, (node + 1) % nodes) for node in range(nodes)]
    last = edges.pop() if nodes % 2 else None
    return [edges[0::2], edges[1::2], *([[last]] if last else [])]


def clock_offset(rank: int, leaders: list[int]) -> dict[int, float]:
    """Measure how many seconds each node's clock is ahead of the first node's, between the first ranks of the nodes over gloo.

    Use the exchange with the shortest round trip, and assume that the remote clock was read in the middle of it.

    Args:
        leaders: the first rank of each node. Other ranks return immediately.

    Returns:
        Offsets in seconds by leader, on the first leader; empty on all other ranks.
    """
    offsets = {leaders[0]: 0.0} if rank == leaders[0] else {}
    stamp = torch.zeros(1, dtype=torch.float64)
    for leader in leaders[1:]:
        if rank == leader:
            for _ in range(PING_PONGS):
                dist.recv(stamp, leaders[0])
                stamp[0] = time.time()
                dist.send(stamp, leaders[0])
        elif rank == leaders[0]:
            answers = []
            for _ in range(PING_PONGS):
                began = time.time()
                dist.send(stamp, leader)
                dist.recv(stamp, leader)
                ended = time.time()
                answers.append((ended - began, stamp.item() - (began + ended) / 2))
            offsets[leader] = min(answers)[1]
    return offsets


def all_reduce_bandwidth(group: dist.ProcessGroup | None, backend: str, device: torch.device) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s, as defined by nccl-tests: bytes * 2 (n - 1) / n / time.

    The time is the median of several repetitions, after a first one that sets up the connections.
    """
    size = dist.get_world_size(group)
    values = torch.ones(BYTES[backend] // 4, dtype=torch.float32, device=device)
    seconds = []
    for repetition in range(REPETITIONS + 1):
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repetition:
            seconds.append(time.perf_counter() - began)
    expected = float(size) ** (REPETITIONS + 1)
    if not torch.all(values == torch.tensor(expected, dtype=torch.float32, device=device)):
        # Powers of a size that is not a power of two are rounded.
        torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-4, atol=0.0)
    return BYTES[backend] * 2 * (size - 1) / size / statistics.median(seconds) / 1e9


def measure(
    rank: int,
    nodes: list[list[int]],
    backend: str | None,
    device: torch.device,
    minimum_gigabytes_per_second: float,
    timeout: timedelta,
    progress: dict[str, Any],
) -> None:
    """Measure the clocks, then the bandwidth of all ranks, and then, if that is too low, the bandwidth of pairs of nodes.

    Args:
        nodes: ranks of each node.
        backend: backend of the bandwidth measurement; None skips it.
        progress: updated during the measurement: `stage` is the current operation, None once finished; `offsets` seconds by
            node; `all_ranks` GB/s; `pairs` GB/s by the other node's index.
    """
    progress["stage"] = "exchanging clocks"
    leaders = [ranks[0] for ranks in nodes]
    offsets = clock_offset(rank, leaders)
    progress["offsets"] = [offsets[leader] for leader in leaders] if offsets else None
    if backend is None or dist.get_world_size() < 2:
        progress["stage"] = None
        return
    progress["stage"] = "an all-reduce over all ranks"
    everyone = dist.new_group(backend=backend, timeout=timeout)
    progress["all_ranks"] = all_reduce_bandwidth(everyone, backend, device)
    # Agree on the slowest value, so that all ranks take the same branch.
    slowest = torch.tensor([progress["all_ranks"]], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    if slowest.item() < minimum_gigabytes_per_second:
        mine = next(index for index, ranks in enumerate(nodes) if rank in ranks)
        for pairs in node_pairs(len(nodes)):
            progress["stage"] = "connecting pairs of nodes"
            # Create all groups on all ranks: groups created only by their members got names that did not match.
            groups = [dist.new_group(nodes[one] + nodes[other], timeout=timeout, backend=backend) for one, other in pairs]
            for group, pair in zip(groups, pairs, strict=True):
                if mine in pair:
                    other = pair[0] + pair[1] - mine
                    progress["stage"] = f"an all-reduce with node {other}"
                    progress["pairs"][str(other)] = all_reduce_bandwidth(group, backend, device)
            progress["stage"] = "waiting for other pairs of nodes"
            dist.barrier()
    progress["stage"] = None
