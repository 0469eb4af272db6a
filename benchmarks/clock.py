"""Time and memory of a call: on CUDA by its events, elsewhere by the clock. Needs torch alone, and Triton on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_milliseconds(work: Callable[[], Any], on_gpu: bool) -> float:
    """Median of repeated calls, with the cache flushed before each on CUDA."""
    if on_gpu:
        from triton.testing import do_bench

        return float(do_bench(work, warmup=25, rep=100, return_mode="median"))
    work()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor reads and writes on this device."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_milliseconds(lambda: target.copy_(source), device.type == "cuda") / 1000)
