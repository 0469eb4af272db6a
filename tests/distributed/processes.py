"""Real gloo processes for tests: started once per world size, given one job after another.

Importing the libraries takes seconds a process, so a pool lives for the whole test session and every job makes its own process
groups for its own layout.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.free_port import free_port

JOB_SECONDS = 240.0


def _serve(rank: int, world_size: int, port: int, jobs: Any, results: Any, stacks: Path) -> None:
    faulthandler.register(signal.SIGUSR2, stacks.open("w"), all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from infini_train import platform

    platform.install()
    import torch

    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        module, function, arguments = job
        try:
            results.put((rank, getattr(importlib.import_module(module), function)(*arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


class ProcessPool:
    """`world_size` ranks of one process group, alive between jobs."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._jobs = [context.Queue() for _ in range(world_size)]
        self._stacks = tempfile.TemporaryDirectory(prefix="stacks-")
        port = free_port()
        os.environ["OMP_NUM_THREADS"] = "1"
        self._ranks = [
            context.Process(
                target=_serve,
                args=(rank, world_size, port, self._jobs[rank], self._results, self._stack_file(rank)),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for rank in self._ranks:
            rank.start()

    def run(self, module: str, function: str, *arguments: Any) -> list[Any]:
        """Call a function on every rank; its results in rank order. Arguments and results are pickled.

        Raises:
            AssertionError: a rank raised (with its traceback) or did not answer in time.
        """
        for jobs in self._jobs:
            jobs.put((module, function, arguments))
        answers: dict[int, Any] = {}
        errors: list[str] = []
        while len(answers) + len(errors) < self.world_size:
            try:
                rank, answer, error = self._results.get(timeout=JOB_SECONDS if not errors else 5.0)
            except queue.Empty:
                break
            if error is None:
                answers[rank] = answer
            else:
                errors.append(f"rank {rank}: {error}")
        if len(answers) < self.world_size:
            if not errors:
                errors = [f"no answer from {self.world_size - len(answers)} ranks: a deadlock?", *self._dump_stacks()]
            self.close()
            raise AssertionError("\n".join(errors))
        return [answers[rank] for rank in range(self.world_size)]

    def _stack_file(self, rank: int) -> Path:
        return Path(self._stacks.name) / f"{rank}.txt"

    def _dump_stacks(self) -> list[str]:
        """Where every rank stands, in all its threads."""
        for rank in self._ranks:
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, signal.SIGUSR2)
        time.sleep(1.0)
        return [f"rank {rank}:\n{self._stack_file(rank).read_text()}" for rank in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self._ranks)

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)
        deadline = time.monotonic() + 5.0
        for rank in self._ranks:
            rank.join(timeout=max(0.0, deadline - time.monotonic()))
            if rank.is_alive():
                rank.kill()
                rank.join()
        self._stacks.cleanup()
