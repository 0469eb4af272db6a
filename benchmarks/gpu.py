"""`make bench-gpu`: the kernels checked on this card, then all that only a GPU can tell, recorded in benchmarks/results/.

Torch and Triton are enough for the checks and for `operation`; `step` and `stream` need Megatron-core and DeepSpeed as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import torch

from benchmarks import operation, run
from tests.support import kernel_cases

MEASURED = {"operation": (), "stream": ("megatron", "deepspeed"), "step": ("megatron", "deepspeed")}
"""What is measured, and the packages that it needs."""
PARTS = ("checks", *MEASURED)


def failure(number: int) -> str | None:
    """Run one body of tests/gpu/test_triton.py; what went wrong."""
    name, check = kernel_cases.on_cuda()[number]
    try:
        check()
    except Exception:
        return f"{name}\n{traceback.format_exc()}"
    return None


def failures(measures_operation: bool) -> list[str]:
    """What went wrong in each check that failed. Compiling the kernels takes most of their time, so several run at once."""
    # Those that take longest first: a single one at the end would keep the others waiting.
    long = ("compiles_whole", "holds_memory", "8B", "many short segments")
    names = [name for name, _ in kernel_cases.on_cuda()]
    numbers = sorted(range(len(names)), key=lambda number: not any(word in names[number] for word in long))
    # Processes that each take every core for the reference would stand in each other's way.
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = max(1, min(16, os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # What will be measured is compiled by the way: torch.compile above all takes long.
        compiled = [pool.submit(operation.compile_all, *each) for each in operation.CASES] if measures_operation else []
        found = [each for each in pool.map(failure, numbers) if each is not None]
        return found + [f"compiling the operation\n{error}" for future in compiled if (error := future.exception()) is not None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parts = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    if "checks" in parts:
        print(f"{torch.cuda.get_device_name()}: checking the kernels against float64", flush=True)
        failed = failures("operation" in parts)
        print(f"{len(kernel_cases.on_cuda())} checks, {len(failed)} failed, {time.monotonic() - started:.0f} s", flush=True)
        if failed:
            print("nothing is measured, because these fail:", *failed, sep="\n", file=sys.stderr)
            return 1
    wanted = []
    for name in (name for name in MEASURED if name in parts):
        missing = [package for package in MEASURED[name] if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {', '.join(missing)} is not installed")
        else:
            wanted.append(name)
    for name, following in zip(wanted, [*wanted[1:], None], strict=True):
        if following is not None and MEASURED[following]:  # in processes of their own, with libraries to import
            from benchmarks.one_process import expect

            expect(f"benchmarks.{following}")
        run.run(name)
        print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
