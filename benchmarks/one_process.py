"""Measurements in separate processes, so that the peak memory belongs to one measurement."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infini_train.config import DataConfig, LayoutConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from infini_train.data.dataset import TokenDataset


class OneDocument(TokenDataset):
    """Dataset whose streams each consist of one document of random tokens, generated on read."""

    def __init__(self, vocab_size: int, tokens: int, documents: int = 1) -> None:
        self.path, self.split = Path("random"), "train"
        self.vocab_size = vocab_size
        self.tokenizer_fingerprint = "random"
        self.document_lengths = np.full(documents, tokens + 1, dtype=np.int64)
        self.available = np.ones(documents, dtype=bool)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        return np.random.default_rng([document, start]).integers(0, self.vocab_size, count)

    def close(self) -> None:
        pass


def single_stream_run(model: ModelConfig, training: TrainingConfig) -> RunConfig:
    """Return a run with one row in one process, in float32 and without learning-rate warm-up."""
    return RunConfig(
        model=model,
        data=DataConfig(vocab_size=256),
        layout=LayoutConfig(zero_stage=0),
        training=training,
        optimizer=OptimizerConfig(warmup_steps=0),
    )


def peak_megabytes() -> float:
    """Return the peak memory of this process in MiB: allocated GPU memory, or resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def current_megabytes() -> float:
    """Return the current resident size of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


_waiting: dict[tuple[str, bool], subprocess.Popen[str]] = {}
"""Processes that have imported a benchmark module and wait for arguments, by (module, returns_memory)."""


def _start(module: str, returns_memory: bool) -> subprocess.Popen[str]:
    code = (
        f"import json, sys, {module} as benchmark; getattr(benchmark, 'prepare', lambda: None)();"
        "print('RESULT', json.dumps(benchmark.one(**json.loads(sys.stdin.readline()))))"
    )
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"
    environment.pop("MALLOC_MMAP_THRESHOLD_", None)
    if returns_memory:
        # glibc returns freed blocks above this size at once. By default it grows, and freed tensors fragment the heap.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **pipes)  # type: ignore[call-overload]


def prestart(module: str) -> None:
    """Start the process for the next `in_own_process` of a module, so that it imports libraries now. Only on GPU machines."""
    if torch.cuda.is_available() and (module, True) not in _waiting:
        _waiting[module, True] = _start(module, True)


def in_own_process(module: str, *, returns_memory: bool = True, others: bool = False, **arguments: Any) -> dict[str, Any]:
    """Call `module.one(**arguments)` in a new interpreter and return its result. Without a GPU, it uses one thread.

    Args:
        module: name of the benchmark's module.
        returns_memory: return freed tensors to the system at once. The peak is then exact, but every allocation takes longer.
            Otherwise the C library decides, as outside of a benchmark.
        others: more calls for this module follow. Importing the libraries takes ten seconds. On a GPU machine, which has
            enough cores, the next process imports them during this measurement.
        arguments: arguments of `one`, which must be JSON values.

    Raises:
        RuntimeError: the process failed; the message is the end of its stderr.
    """
    key = module, returns_memory
    process = _waiting.pop(key, None) or _start(*key)
    if others:
        prestart(module)
    output, errors = process.communicate(json.dumps(arguments) + "\n")
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return json.loads(output.split("RESULT ", 1)[1])


@atexit.register
def _kill_waiting() -> None:
    for process in _waiting.values():
        process.kill()


def import_trainer() -> None:
    """Import all modules that a training step needs."""
    from infini_train.runtime import platform

    platform.install()
    import infini_train.training.step  # noqa: F401

    if torch.cuda.is_available():
        importlib.import_module("torch._inductor.compile_fx")


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of a call: wall time with a GPU, else processor time.

    On one thread, processor time is equal to the wall time on an idle machine.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started
