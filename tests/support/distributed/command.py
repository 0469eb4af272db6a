"""Run `infini-train` as a user does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.warm.interpreter import launcher, python

REPOSITORY = Path(__file__).parents[3]


def call(
    *arguments: str, expected: int = 0, processes: int | None = None, torchrun: bool = False, timeout: float = 560.0
) -> str:
    """Run a command, check its exit code, and return its output.

    Args:
        expected: exit code.
        processes: number of processes to start with launch/local.py or torchrun; None runs the command directly.
    """
    command = [python(), "-m", "infini_train"]
    if torchrun:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    elif processes:
        command = [*launcher(REPOSITORY / "launch" / "local.py"), str(processes)]
    result = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == expected, result.stdout
    assert "Traceback" not in result.stdout
    return result.stdout
