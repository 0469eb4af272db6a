"""One measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

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


def in_own_process(module: str, *, returns_memory: bool = True, **arguments: Any) -> dict[str, Any]:
    """Call `module.one(**arguments)` in a fresh interpreter, on a CPU with one thread; its result as JSON.

    Args:
        returns_memory: let freed tensors leave the process, which makes its peak exact but costs time at every allocation;
            otherwise the C library decides, as it would outside of a benchmark.
    """
    code = f"import json, sys; from {module} import one; print('RESULT', json.dumps(one(**json.loads(sys.argv[1]))))"
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"
    environment.pop("MALLOC_MMAP_THRESHOLD_", None)
    if returns_memory:
        # glibc gives memory back at once above this size. Its own threshold grows, and freed tensors would stay in fragments.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, env=environment, check=False
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.split("RESULT ", 1)[1])


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
