"""Checks of one process on its own node: folders, free space, GPUs. Each check has a time limit."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FREE_BYTES = 2**30
"""Minimum free space for a run: metrics, logs, and temporary files of libraries."""
WRITTEN_BYTES = 2**20
"""Size of the test file."""
MATRIX = 1024
"""Rows and columns of the test matrices."""


@dataclass
class Check:
    """The outcome of one check on one rank."""

    name: str
    ok: bool
    value: str
    """The result, or the problem."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def node_name() -> str:
    """Return the node name from SLURM, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def run_with_timeout(seconds: float, name: str, check: Callable[[], object]) -> Check:
    """Run a check with a time limit, because it may hang (a dead file server, a GPU that fell off the bus).

    Args:
        check: function that returns its result, or raises an exception.
    """
    outcome: list[Check] = []

    def run() -> None:
        try:
            outcome.append(Check(name, True, str(check())))
        except Exception as error:
            outcome.append(Check(name, False, " ".join(str(error).split()) or type(error).__name__))

    # Use a daemon thread, so that a hanging check does not prevent the process from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    return outcome[0] if outcome else Check(name, False, f"not finished in {seconds:.0f} s")


def check_folder(path: Path, free_bytes: int) -> str:
    """Write a file, sync it to disk, read it back, and delete it.

    Raises:
        OSError: the folder cannot be written, returns other bytes than were written, or has less space than `free_bytes`.
    """
    probe = path / f".preflight-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    content = os.urandom(WRITTEN_BYTES)
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != content:
            raise OSError(f"{path} returned other bytes than were written")
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(path).free
    if free < free_bytes:
        raise OSError(f"{path} has {free / 2**30:.1f} GiB free, less than the {free_bytes / 2**30:.1f} GiB that are needed")
    return f"{free / 2**30:.0f} GiB free"


def needed_bytes(run_dir: Path) -> int:
    """Return the space that the next checkpoint needs: the size of the largest existing one, at least FREE_BYTES."""
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in run_dir.glob("checkpoints/step_*")
    ]
    return max([FREE_BYTES, *sizes])


def check_run_dir(run_dir: Path) -> str:
    """Create the run directory if it does not exist, and check it.

    Raises:
        OSError: see `check_folder`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    return check_folder(run_dir, needed_bytes(run_dir))


def temporary_folder() -> Path:
    """Return the node's temporary folder. Prefer TMPDIR, because tempfile silently replaces it if it is not usable."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())


def check_gpus(expected: int, local_rank: int, local_world_size: int) -> str:
    """Count the GPUs, and multiply matrices on those of this rank. With small integers the product is exact.

    Raises:
        RuntimeError: the number of GPUs is not the expected one, or a product is wrong.
    """
    import torch

    count = torch.cuda.device_count()
    if count != expected:
        raise RuntimeError(f"{count} GPUs are visible, not {expected}")
    generator = torch.Generator().manual_seed(local_rank)
    left, right = (torch.randint(-4, 5, (MATRIX, MATRIX), generator=generator).float() for _ in range(2))
    product = left @ right
    for index in range(local_rank, count, local_world_size):
        device = torch.device("cuda", index)
        if not torch.equal((left.to(device) @ right.to(device)).cpu(), product):
            raise RuntimeError(f"GPU {index} multiplies matrices wrongly")
    return f"{count} GPUs"


def check_node(
    folder: Path, gpus_per_node: int, local_rank: int, local_world_size: int, timeout_seconds: float
) -> list[dict[str, Any]]:
    """Run all checks of this rank. Only the first rank of a node checks folders.

    Args:
        timeout_seconds: time limit of all checks together.
    """
    deadline = time.monotonic() + timeout_seconds
    checks = []
    if local_rank == 0:
        checks.append(run_with_timeout(deadline - time.monotonic(), "folder", lambda: check_run_dir(folder)))
        checks.append(
            run_with_timeout(deadline - time.monotonic(), "temp", lambda: check_folder(temporary_folder(), FREE_BYTES))
        )
    if gpus_per_node > 0:
        checks.append(
            run_with_timeout(
                deadline - time.monotonic(), "gpus", lambda: check_gpus(gpus_per_node, local_rank, local_world_size)
            )
        )
    return [check.as_dict() for check in checks]
