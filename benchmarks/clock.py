"""Timing of calls, with CUDA events on a GPU and the system clock elsewhere. Needs only torch, and Triton on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_milliseconds(work: Callable[[], Any], on_gpu: bool) -> float:
    """Return the median time of repeated calls. On a GPU, the cache is flushed before each call."""
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
    """Return the bytes per second that a copy of a large tensor reads and writes on this device."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_milliseconds(lambda: target.copy_(source), device.type == "cuda") / 1000)
