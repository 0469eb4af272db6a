"""`make bench-gpu`: the kernels checked on this card, then all that only a GPU can tell, recorded in benchmarks/results/.

Torch and Triton are enough for the checks and for `operation`; `step` and `stream` need Megatron-core and DeepSpeed as well.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import torch

from benchmarks import run
from tests import kernel_cases

NEEDS = {"operation": (), "step": ("megatron", "deepspeed"), "stream": ("megatron", "deepspeed")}


def failure(number: int) -> str | None:
    """Run one body of tests/gpu/test_triton.py; what went wrong."""
    name, check = kernel_cases.on_cuda()[number]
    try:
        check()
    except Exception:
        return f"{name}\n{traceback.format_exc()}"
    return None


def failures() -> list[str]:
    """What went wrong in each check that failed. Compiling the kernels takes most of their time, so several run at once."""
    numbers = range(len(kernel_cases.on_cuda()))
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [each for each in pool.map(failure, numbers) if each is not None]


def main() -> int:
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}: checking the kernels against float64")
    failed = failures()
    print(f"{len(kernel_cases.on_cuda())} checks, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    if failed:
        print("nothing is measured, because these fail:", *failed, sep="\n", file=sys.stderr)
        return 1
    for name, needed in NEEDS.items():
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {', '.join(missing)} is not installed")
            continue
        run.run(name)
        print(f"{time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
