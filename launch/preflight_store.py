"""Communication of the preflight's ranks over a key-value store, in which a missing entry shows that a rank hangs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.05


def post(store: Store, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def read(store: Store, key: str, seconds: float) -> Any:
    """Wait for a key and return its value.

    Raises:
        torch.distributed.DistStoreError, RuntimeError: the key is not set in time, or the store is lost.
    """
    store.wait([key], timedelta(seconds=max(seconds, 0.1)))
    return json.loads(store.get(key))


def collect(store: Store, kind: str, ranks: list[int], deadline: float) -> dict[int, Any]:
    """Return the values of KIND/RANK by rank, as soon as all are set, or those set by the deadline (in `time.monotonic`)."""
    missing = list(ranks)
    while missing:
        missing = [rank for rank in missing if not store.check([f"{kind}/{rank}"])]
        if time.monotonic() > deadline:
            break
        if missing:
            time.sleep(POLL_SECONDS)
    return {rank: read(store, f"{kind}/{rank}", 1.0) for rank in ranks if rank not in missing}


def slurm_nodes() -> list[str] | None:
    """Return the names of the job's nodes in rank order, or None outside a SLURM job."""
    if "SLURM_JOB_NODELIST" not in os.environ or shutil.which("scontrol") is None:
        return None
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split()


def group_by_node(names: dict[int, str], world_size: int, local_world_size: int) -> list[tuple[str, list[int]]]:
    """Return the nodes and their ranks, in rank order.

    Ranks are assigned to nodes in blocks: first all ranks of the first node, then all of the second. A rank that reported no
    name gets SLURM's name for its node, else the name that other ranks of its block reported, else a placeholder.
    """
    known = slurm_nodes() if len(names) < world_size else None
    nodes: dict[str, list[int]] = {}
    for rank in range(world_size):
        name = names.get(rank)
        block = rank // local_world_size
        if name is None:
            neighbours = [names[other] for other in names if other // local_world_size == block]
            name = known[block] if known and block < len(known) else (neighbours or [f"(unknown node of rank {rank})"])[0]
        nodes.setdefault(name, []).append(rank)
    return list(nodes.items())


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
