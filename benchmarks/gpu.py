"""`make bench-gpu`: the kernels checked on this card, then all that only a GPU can tell, recorded in benchmarks/results/.

Torch and Triton are enough for the checks and for `operation`; `step` and `stream` need Megatron-core and DeepSpeed as well.
"""

from __future__ import annotations

import sys
import time
import traceback
from importlib.util import find_spec

import torch

from benchmarks import run
from tests import kernel_cases

NEEDS = {"operation": (), "step": ("megatron", "deepspeed"), "stream": ("megatron", "deepspeed")}


def failures() -> list[str]:
    """Run the bodies of tests/gpu/test_triton.py; names of those that fail."""
    failed = []
    for name, check in kernel_cases.on_cuda():
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return failed


def main() -> int:
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}: checking the kernels against float64")
    failed = failures()
    print(f"{len(kernel_cases.on_cuda())} checks, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    if failed:
        print("nothing is measured, because these fail:", *failed, sep="\n  ", file=sys.stderr)
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
