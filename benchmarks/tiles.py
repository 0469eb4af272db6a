"""Tile sizes for this GPU: time every kernel of one layer's memory path with other blocks, warps and pipeline stages.

The row marked "now" is the choice of `blocks.tile` and `blocks.sum_tile`. Needs CUDA, torch and Triton.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import copy_bandwidth
from benchmarks.operation import GEOMETRIES, Geometry, inputs, memory_path
from infini_kernels.triton import blocks

TOKENS = 32768
BY_TOKENS: dict[str, tuple[Any, ...]] = {
    "BW": (32, 64, 128),
    "tokens of a program": (512, 1024, 2048),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
BY_STATE: dict[str, tuple[Any, ...]] = {
    "BW": (32, 64, 128),
    "BD": (64, 128),
    "BV": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3),
}
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "_read_kernel": BY_TOKENS,
    "_read_backward_kernel": BY_TOKENS,
    "_states_backward_kernel": BY_TOKENS,
    "_removal_backward_kernel": BY_TOKENS,
    "_states_kernel": BY_STATE,
    "_read_backward_states_kernel": BY_STATE,
    "_removal_kernel": {"BW": (32, 64, 128), "BD": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    "_recurrence_kernel": {"BV": (16, 32), "BK": (32, 64, 128), "num_warps": (4, 8), "PRECISION": ("ieee", "tf32x3")},
}
"""Values to try, by kernel and by name of a constant or option. Other kernels are timed only with their current choice."""
BY_PROGRAM = {"_read_backward_kernel": ("dshare_ptr", "dstate_ptr", "dz_ptr"), "_removal_backward_kernel": ("dz_ptr",)}
"""Outputs with one element or state per program. They must be larger if another tile has more programs."""


@dataclass(frozen=True)
class Trial:
    """A kernel launch with one choice of blocks and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    choice: str

    def start(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.settings)

    def compilation(self) -> tuple[str, str, list[Any], dict[str, Any]]:
        """Return the arguments with which another process can compile the kernel into Triton's cache."""
        plain = [argument.dtype if isinstance(argument, Tensor) else argument for argument in self.arguments]
        return self.kernel.fn.__module__, self.kernel.__name__, plain, self.settings


def compile_one(compilation: tuple[str, str, list[Any], dict[str, Any]]) -> str | None:
    """Compile a kernel into the cache and return the error, or None."""
    module, name, arguments, settings = compilation
    try:
        getattr(importlib.import_module(module), name).warmup(*arguments, grid=(1,), **settings)
    except Exception as error:  # a tile that does not compile is a result, not a failure
        return f"{type(error).__name__}: {error}"[:200]
    return None


def recorded(geometry: Geometry, tokens: int, rule: str, device: str = "cuda") -> list[Trial]:
    """Run one layer's memory path, forward and backward, and return its kernel launches."""
    found: list[Trial] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Any, constants: Any) -> None:
        found.append(Trial(kernel, grid, arguments, {**constants, **options}, "now"))
        found[-1].start()

    q, k, v, gate = leaves = inputs(geometry, tokens, torch.device(device), torch.bfloat16)
    local = torch.randn_like(q).requires_grad_()
    blocks.observers.append(record)
    try:
        out = memory_path(q, k, v, gate, local, geometry, rule)
        torch.autograd.grad(out, (*leaves, local), torch.randn_like(out))
    finally:
        blocks.observers.pop()
    return found


def others(now: Trial) -> Iterator[Trial]:
    """Yield the same launch with every other choice."""
    name = now.kernel.__name__
    choices = CHOICES.get(name, {})
    grow = BY_PROGRAM.get(name, ())
    arguments = tuple(
        argument.new_empty(argument.numel() * 8) if parameter in grow and argument is not None else argument
        for parameter, argument in zip(now.kernel.arg_names, now.arguments, strict=False)
    )
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        choice = " ".join(f"{key} {value}" for key, value in chosen.items())
        if "PER" in now.settings:
            chosen["PER"] = max(1, chosen.pop("tokens of a program") // chosen["BW"])
        settings = {**now.settings, **chosen}
        if settings != now.settings:
            yield Trial(now.kernel, grid(name, now.grid, settings), arguments, settings, choice)


def grid(name: str, now: tuple[int, ...], settings: dict[str, Any]) -> tuple[int, ...]:
    """Return the grid of a launch with changed blocks.

    Args:
        now: grid of the current choice.
    """
    if name in ("_states_kernel", "_read_backward_states_kernel"):
        return now[0], -(-settings["D"] // settings["BD"]), -(-settings["DV"] // settings["BV"])
    if name == "_removal_kernel":
        return now[0], -(-settings["D"] // settings["BD"]), -(-settings["D"] // settings["BD"])
    if name == "_recurrence_kernel":
        return now[0], -(-settings["DV"] // settings["BV"])
    return now[0], -(-settings["W"] // (settings["BW"] * settings["PER"]))


def milliseconds(trial: Trial) -> float | None:
    """Return the median time of a launch, or None if the GPU rejects it."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(trial.start, warmup=10, rep=40, return_mode="median"))
    except (OutOfResources, RuntimeError):
        return None


def measure(geometry: Geometry = GEOMETRIES[-1], tokens: int = TOKENS, best: int = 4) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the current time of each kernel of the delta rule, and its `best` fastest other choices."""
    launches = recorded(geometry, tokens, "delta")
    trials = [[now, *others(now)] for now in launches]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        failed = list(pool.map(compile_one, [trial.compilation() for each in trials for trial in each]))
    bandwidth = copy_bandwidth(torch.device("cuda"))
    rows = []
    for now, *more in trials:
        touched = sum(each.nbytes for each in now.arguments if isinstance(each, Tensor))
        timed = sorted(((took, each) for each in more if (took := milliseconds(each)) is not None), key=lambda pair: pair[0])
        for took, trial in [(milliseconds(now), now), *timed[:best]]:
            rows.append(
                {
                    "kernel": now.kernel.__name__.strip("_").removesuffix("_kernel"),
                    "choice": trial.choice,
                    "ms": took,
                    "arguments GB": touched / 1e9,
                    "of copy bandwidth": took and 1000 * touched / bandwidth / took,
                }
            )
    refused = [each for each in failed if each is not None]
    return rows, [
        f"{geometry.name}, {tokens} tokens, copy bandwidth {bandwidth / 1e12:.3f} TB/s; {len(refused)} choices do not compile",
        *sorted(set(refused))[:3],
    ]
