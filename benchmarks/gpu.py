"""`make bench-gpu`: kernel checks on this GPU, then the GPU benchmarks. Records are written to benchmarks/results/.

The checks and `operation` need only torch and Triton; `step` and `stream` also need Megatron-core and DeepSpeed.
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
"""Benchmark -> packages that it needs in addition to torch and Triton."""
PHASES = ("checks", *MEASURED)


def failure(number: int) -> str | None:
    """Run one check of tests/support/kernel_cases.py and return the error, or None."""
    name, check = kernel_cases.on_cuda()[number]
    try:
        check()
    except Exception:
        return f"{name}\n{traceback.format_exc()}"
    return None


def failures(measures_operation: bool) -> list[str]:
    """Run all checks and return the error of each that failed.

    Compiling the kernels takes most of the time, so several checks run in parallel.

    Args:
        measures_operation: also compile the kernels that `benchmarks.operation` will measure.
    """
    # Start the longest checks first, so that none of them runs alone at the end.
    long = ("compiles_whole", "holds_memory", "8B", "many short segments")
    names = [name for name, _ in kernel_cases.on_cuda()]
    numbers = sorted(range(len(names)), key=lambda number: not any(word in names[number] for word in long))
    # One thread per process: with more, the processes would compete for the cores in the reference computation.
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = max(1, min(16, os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Compile the measured operation at the same time, because torch.compile takes long.
        compiled = [pool.submit(operation.compile_all, *each) for each in operation.CASES] if measures_operation else []
        found = [each for each in pool.map(failure, numbers) if each is not None]
        return found + [f"compiling the operation\n{error}" for future in compiled if (error := future.exception()) is not None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, help="run only these phases")
    phases = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device, but torch finds none", file=sys.stderr)
        return 2
    started = time.monotonic()
    if "checks" in phases:
        print(f"{torch.cuda.get_device_name()}: checking the kernels against float64", flush=True)
        failed = failures("operation" in phases)
        print(f"{len(kernel_cases.on_cuda())} checks, {len(failed)} failed, {time.monotonic() - started:.0f} s", flush=True)
        if failed:
            print("nothing is measured, because these fail:", *failed, sep="\n", file=sys.stderr)
            return 1
    wanted = []
    for name in (name for name in MEASURED if name in phases):
        missing = [package for package in MEASURED[name] if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {', '.join(missing)} is not installed")
        else:
            wanted.append(name)
    for name, following in zip(wanted, [*wanted[1:], None], strict=True):
        if following is not None and MEASURED[following]:  # runs in its own process and imports large libraries
            from benchmarks.one_process import prestart

            prestart(f"benchmarks.{following}")
        run.run(name)
        print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
