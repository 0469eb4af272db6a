"""One measurement in a process of its own, so that its peak memory is its own."""

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
    """Streams that are one document of random tokens each, made as they are read."""

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
    """One row in one process, float32, without clipping's or warm-up's influence on what is measured."""
    return RunConfig(
        model=model,
        data=DataConfig(vocab_size=256),
        layout=LayoutConfig(zero_stage=0),
        training=training,
        optimizer=OptimizerConfig(warmup_steps=0),
    )


def peak_megabytes() -> float:
    """Most memory that this process had so far: of its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def current_megabytes() -> float:
    """Resident size of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


_waiting: dict[tuple[str, bool], subprocess.Popen[str]] = {}
"""Processes that have imported a benchmark's module and wait for its arguments."""


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
        # glibc gives memory back at once above this size. Its own threshold grows, and freed tensors would stay in fragments.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **pipes)  # type: ignore[call-overload]


def expect(module: str) -> None:
    """`in_own_process` will be called for this module: on a GPU machine let it import its libraries from now on."""
    if torch.cuda.is_available() and (module, True) not in _waiting:
        _waiting[module, True] = _start(module, True)


def in_own_process(module: str, *, returns_memory: bool = True, others: bool = False, **arguments: Any) -> dict[str, Any]:
    """Call `module.one(**arguments)` in a fresh interpreter, on a CPU with one thread; its result as JSON.

    Args:
        returns_memory: let freed tensors leave the process, which makes its peak exact but costs time at every allocation;
            otherwise the C library decides, as it would outside of a benchmark.
        others: more calls for this module follow. The libraries take ten seconds to import; on a GPU machine, which has cores
            enough, the next process does so beside this measurement.
    """
    key = module, returns_memory
    process = _waiting.pop(key, None) or _start(*key)
    if others:
        expect(module)
    output, errors = process.communicate(json.dumps(arguments) + "\n")
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return json.loads(output.split("RESULT ", 1)[1])


@atexit.register
def _let_go() -> None:
    for process in _waiting.values():
        process.kill()


def import_trainer() -> None:
    """Import everything that a training step needs."""
    from infini_train.runtime import platform

    platform.install()
    import infini_train.training.step  # noqa: F401

    if torch.cuda.is_available():
        importlib.import_module("torch._inductor.compile_fx")


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes on the GPU; without one its processor time, on one thread what an idle machine would take."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started
