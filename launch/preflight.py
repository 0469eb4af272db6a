#!/usr/bin/env python3
"""Check every node before training: GPUs, folders, clocks, bandwidth.

Start it on every rank, with torch.distributed's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). All ranks return the same verdict; docs/launching.md explains it. Exit codes: 0 no problem, 3 bad nodes
(FOLDER/job/bad_nodes names them), 4 a problem that cannot be attributed to single nodes, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.preflight_node import check_node, node_name, run_with_timeout
from launch.preflight_store import collect, group_by_node, post, read, slurm_nodes, write_atomically
from launch.preflight_verdict import BAD_NODES, GENERAL_PROBLEM, Node, Verdict, judge, table

if TYPE_CHECKING:
    from torch.distributed import Store

HEARTBEAT_SECONDS = 1.0
"""Interval of rank 0's heartbeat."""


@dataclass(frozen=True)
class Rank:
    """The position of this process in the job, and the address of rank 0."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def parse() -> tuple[argparse.Namespace, Rank]:
    parser = argparse.ArgumentParser(description="Check every node before training.")
    parser.add_argument("--folder", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--gpus_per_node", type=int, default=0, help="GPUs that must be visible on each node; 0 for nodes without GPUs"
    )
    parser.add_argument(
        "--minimum_gigabytes_per_second", type=float, default=0.0, help="required bandwidth between nodes; 0 only reports it"
    )
    parser.add_argument(
        "--maximum_clock_skew_seconds", type=float, default=5.0, help="allowed difference from the clocks of most other nodes"
    )
    parser.add_argument(
        "--timeout_seconds",
        type=float,
        default=120.0,
        help="time limit of the checks on each node, and of the joint measurement",
    )
    arguments = parser.parse_args()
    for name in ("gpus_per_node", "minimum_gigabytes_per_second"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must not be negative")
    for name in ("maximum_clock_skew_seconds", "timeout_seconds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be more than 0")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value.isdigit():
            parser.error(
                f"{name} is {value!r} in the environment; start the preflight on every rank with launch/multinode.py or srun"
            )
        numbers[name.lower()] = int(value)
    address = os.environ.get("MASTER_ADDR")
    if not address:
        parser.error(
            "MASTER_ADDR is not in the environment; start the preflight on every rank with launch/multinode.py or srun"
        )
    return arguments, Rank(master_addr=address, **numbers)


def connect(rank: Rank, timeout_seconds: float) -> Store:
    """Connect to the key-value store that rank 0 serves.

    Raises:
        RuntimeError: rank 0 does not answer in time.
    """
    import torch.distributed as dist

    return dist.TCPStore(
        rank.master_addr,
        rank.master_port,
        rank.world_size,
        is_master=rank.rank == 0,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
    )


def measure_together(
    store: Store, rank: Rank, nodes: list[list[int]], bandwidth: bool, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure clocks and bandwidth in a thread that is abandoned at the time limit. Return its progress."""
    progress: dict[str, Any] = {"stage": "connecting over gloo", "offsets": None, "all_ranks": None, "pairs": {}, "error": None}
    timeout = timedelta(seconds=arguments.timeout_seconds)

    def run() -> None:
        import torch
        import torch.distributed as dist

        from launch.preflight_bandwidth import measure

        try:
            device = torch.device("cpu")
            if arguments.gpus_per_node > 0:
                device = torch.device("cuda", rank.local_rank % arguments.gpus_per_node)
                torch.cuda.set_device(device)
            gloo_store = dist.PrefixStore("gloo", store)
            dist.init_process_group("gloo", store=gloo_store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
            backend = ("nccl" if arguments.gpus_per_node > 0 else "gloo") if bandwidth else None
            measure(rank.rank, nodes, backend, device, arguments.minimum_gigabytes_per_second, timeout, progress)
        except Exception as error:
            progress["error"] = " ".join(str(error).split())[:500]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(arguments.timeout_seconds)
    result = dict(progress)
    if thread.is_alive():
        result["error"] = f"not finished in {arguments.timeout_seconds:g} s"
    return result


def coordinate(store: Store, rank: Rank, arguments: argparse.Namespace, began: float) -> Verdict:
    """Run rank 0's coordination: collect reports, publish the plan for the other ranks, and form the verdict."""
    ranks = list(range(rank.world_size))
    names = collect(store, "node", ranks, began + arguments.timeout_seconds)
    checks = collect(store, "checks", list(names), time.monotonic() + arguments.timeout_seconds)
    nodes = [Node(name, members) for name, members in group_by_node(names, rank.world_size, rank.local_world_size)]
    complete = len(checks) == rank.world_size
    # A missing or faulty GPU would make NCCL hang, so skip the bandwidth then.
    gpus = all(check["ok"] for found in checks.values() for check in found if check["name"] == "gpus")
    members = [node.ranks for node in nodes]
    post(store, "plan", {"nodes": members, "measure": complete, "bandwidth": gpus})
    measured = None
    if complete:
        own = measure_together(store, rank, members, gpus, arguments)
        post(store, "measured/0", own)
        measured = collect(store, "measured", ranks, time.monotonic() + arguments.timeout_seconds)
    return judge(
        nodes,
        checks,
        measured,
        minimum_gigabytes_per_second=arguments.minimum_gigabytes_per_second,
        maximum_clock_skew_seconds=arguments.maximum_clock_skew_seconds,
        timeout_seconds=arguments.timeout_seconds,
    )


def write_verdict(verdict: Verdict, job: Path) -> None:
    """Write preflight.json, and bad_nodes if there are bad nodes.

    Raises:
        OSError: the folder cannot be written.
    """
    job.mkdir(parents=True, exist_ok=True)
    content = {**asdict(verdict), "bad_nodes": verdict.bad_nodes, "exit_code": verdict.exit_code}
    write_atomically(job / "preflight.json", json.dumps(content, indent=1) + "\n")
    (job / "bad_nodes").unlink(missing_ok=True)
    if verdict.bad_nodes:
        write_atomically(job / "bad_nodes", "".join(f"{name}\n" for name in verdict.bad_nodes))


def publish_verdict(store: Store, rank: Rank, arguments: argparse.Namespace) -> int:
    """Read the verdict and return its exit code. A good node's first rank writes it, because a bad node may fail to."""
    seconds = arguments.timeout_seconds
    verdict = Verdict.from_dict(read(store, "verdict", 4 * seconds))
    writer = next((node.ranks[0] for node in verdict.nodes if not node.problems), 0)
    if rank.rank == writer:
        job = arguments.folder / "job"
        written = run_with_timeout(seconds, "verdict", lambda: write_verdict(verdict, job))
        if not written.ok:
            print(f"preflight: {job} cannot be written: {written.value}", file=sys.stderr)
        post(store, "code", verdict.exit_code if written.ok else GENERAL_PROBLEM)
    code = int(read(store, "code", 2 * seconds))
    post(store, f"left/{rank.rank}", True)
    return code


def heartbeat_file(folder: Path, rank: Rank) -> Path:
    """Return rank 0's heartbeat file, for ranks that cannot connect to it. The port in its name differs at each start."""
    return folder / "job" / f".preflight-{rank.master_port}"


def start_heartbeat(folder: Path, rank: Rank) -> None:
    """Increment a counter in the file, in a thread. Ignore write errors, because the folder check reports them."""

    def beat() -> None:
        path = heartbeat_file(folder, rank)
        for count in itertools.count():
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(str(count))
            time.sleep(HEARTBEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()


def has_heartbeat(folder: Path, rank: Rank) -> bool:
    """Return whether the counter in rank 0's heartbeat file increases."""
    try:
        first = heartbeat_file(folder, rank).read_text()
        time.sleep(5 * HEARTBEAT_SECONDS)
        return heartbeat_file(folder, rank).read_text() != first
    except OSError:
        return False


def handle_lost_rank_0(rank: Rank, folder: Path, error: Exception) -> int:
    """Handle a rank 0 that does not answer. If its heartbeat continues, the network of this node may be at fault instead."""
    reason = " ".join(str(error).split())[:300]
    print(
        f"preflight: rank 0 at {rank.master_addr}:{rank.master_port} does not answer rank {rank.rank}: {reason}",
        file=sys.stderr,
    )
    nodes = slurm_nodes()
    if not nodes or nodes[0] == node_name() or has_heartbeat(folder, rank):
        return GENERAL_PROBLEM
    first = Node(nodes[0], [0], problems={"answer": "rank 0 did not answer other ranks"})
    try:
        write_verdict(Verdict([first], []), folder / "job")
    except OSError:
        return GENERAL_PROBLEM
    print(f"preflight: {nodes[0]} is bad", file=sys.stderr)
    return BAD_NODES


def run(arguments: argparse.Namespace, rank: Rank) -> int:
    began = time.monotonic()
    seconds = arguments.timeout_seconds
    # NCCL's error handling would end the process before it can report. Every operation here has its own time limit.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        store = connect(rank, seconds)
        post(store, f"node/{rank.rank}", node_name())
        if rank.rank == 0:
            start_heartbeat(arguments.folder, rank)
    except Exception as error:
        return handle_lost_rank_0(rank, arguments.folder, error)
    try:
        post(
            store,
            f"checks/{rank.rank}",
            check_node(arguments.folder, arguments.gpus_per_node, rank.local_rank, rank.local_world_size, seconds),
        )
        if rank.rank == 0:
            verdict = coordinate(store, rank, arguments, began)
            print(table(verdict), flush=True)
            post(store, "verdict", asdict(verdict))
        elif (plan := read(store, "plan", 3 * seconds))["measure"]:
            measured = measure_together(store, rank, plan["nodes"], plan["bandwidth"], arguments)
            post(store, f"measured/{rank.rank}", measured)
        code = publish_verdict(store, rank, arguments)
        if rank.rank == 0:
            # This process serves the store, so wait until the other ranks have read the exit code.
            collect(store, "left", list(range(1, rank.world_size)), time.monotonic() + 5.0)
        return code
    except Exception as error:
        return handle_lost_rank_0(rank, arguments.folder, error)


def main() -> int:
    arguments, rank = parse()
    code = run(arguments, rank)
    if rank.rank == 0:
        run_with_timeout(arguments.timeout_seconds, "heartbeat", heartbeat_file(arguments.folder, rank).unlink)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit at once: threads that hang in a driver or a file server would prevent a normal exit.
    os._exit(code)
