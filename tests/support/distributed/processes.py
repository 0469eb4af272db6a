"""Run test jobs on real gloo processes. A job is a function that every rank calls; each job has its own process group."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.rank_processes import rank_environments
from tests.support.free_port import free_port
from tests.support.warm.interpreter import python

JOB_SECONDS = 240.0
GRACE_SECONDS = 5.0
"""Time for the other ranks to end after one has failed."""
REPOSITORY = Path(__file__).parents[3]


class Ranks:
    """Starts `world_size` processes for each job."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(self, module: str, function: str, *arguments: Any) -> list[Any]:
        """Call a function on every rank and return the results in rank order. Arguments and results are pickled.

        Raises:
            AssertionError: a rank raised (with its traceback) or did not answer in time (with the stacks of all ranks).
        """
        with tempfile.TemporaryDirectory(prefix="ranks-") as name:
            folder = Path(name)
            (folder / "job").write_bytes(pickle.dumps((module, function, arguments)))
            environments = rank_environments(
                0, 1, self.world_size, "127.0.0.1", free_port(), {**os.environ, "OMP_NUM_THREADS": "1"}
            )
            command = [python(), "-m", "tests.support.distributed.rank", name]
            ranks = [subprocess.Popen(command, env=environment, cwd=REPOSITORY) for environment in environments]
            try:
                errors = self._wait(ranks, folder)
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
            if errors:
                raise AssertionError("\n".join(errors))
            return [pickle.loads((folder / f"answer{rank}").read_bytes()) for rank in range(self.world_size)]

    def _wait(self, ranks: list[subprocess.Popen[bytes]], folder: Path) -> list[str]:
        """Wait until all ranks have answered, or one has failed and the grace period is over. Return the errors."""
        deadline = time.monotonic() + JOB_SECONDS
        failed: set[int] = set()
        answered: set[int] = set()
        while len(failed | answered) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            answered = {rank for rank in range(self.world_size) if (folder / f"answer{rank}").exists()}
            for rank, process in enumerate(ranks):
                if process.poll() is not None and rank not in failed and not (folder / f"answer{rank}").exists():
                    failed.add(rank)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answered) == self.world_size:
            return []
        if not failed:
            late = f"no answer from {self.world_size - len(answered)} ranks: a deadlock?"
            return [late, *self._dump_stacks(ranks, folder)]
        return [f"rank {rank}, exit code {ranks[rank].returncode}: {self._error(folder, rank)}" for rank in sorted(failed)]

    def _error(self, folder: Path, rank: int) -> str:
        path = folder / f"error{rank}"
        return path.read_text() if path.exists() else "it said nothing"

    def _dump_stacks(self, ranks: list[subprocess.Popen[bytes]], folder: Path) -> list[str]:
        """Return the stacks of all threads of every rank."""
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR2)
        time.sleep(1.0)
        return [f"rank {rank}:\n{(folder / f'stacks{rank}').read_text()}" for rank in range(self.world_size)]
