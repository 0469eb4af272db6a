"""How the ranks of a preflight talk: over a key-value store, so that a rank that hangs is missed and not waited for."""

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
    """What was posted under a key; waits for it.

    Raises:
        torch.distributed.DistStoreError, RuntimeError: nothing within the time, or the store is gone.
    """
    store.wait([key], timedelta(seconds=max(seconds, 0.1)))
    return json.loads(store.get(key))


def collect(store: Store, kind: str, ranks: list[int], deadline: float) -> dict[int, Any]:
    """What ranks posted under KIND/RANK, as soon as all did, or what is there at the deadline (by `time.monotonic`)."""
    missing = list(ranks)
    while missing:
        missing = [rank for rank in missing if not store.check([f"{kind}/{rank}"])]
        if time.monotonic() > deadline:
            break
        if missing:
            time.sleep(POLL_SECONDS)
    return {rank: read(store, f"{kind}/{rank}", 1.0) for rank in ranks if rank not in missing}


def slurm_nodes() -> list[str] | None:
    """Names of the job's nodes in the order of ranks, where SLURM is there to tell."""
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
    """Nodes and their ranks, in the order of ranks. Ranks that told no name get SLURM's, or one that says so.

    Ranks are laid out in blocks: all of the first node, then all of the second.
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
