"""Infini-attention of one layer, forward and backward: kernels, plain PyTorch, torch.compile, and local attention alone.

The memory path is everything except local attention. Its forward pass must read queries, keys, values and the local output,
and write the mixed output. Its backward pass must read these tensors and the output's gradient, and write four gradients.
Both also read and write states.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import copy_bandwidth, median_milliseconds
from benchmarks.run import progress
from infini_kernels import infini_attention
from infini_kernels.compressive import SegmentMemory
from infini_kernels.segments import SegmentLayout
from infini_kernels.triton.operation import KernelUpdates, local_half, tokens_by_segment
from infini_kernels.triton.read import read_and_mix
from infini_kernels.triton.states import segment_states


@dataclass(frozen=True)
class Geometry:
    """Heads and segment length of a layer. `groups` are key/value heads, `width` is the head width."""

    name: str
    heads: int
    groups: int
    width: int
    segment: int = 2048


GEOMETRIES = (Geometry("1B", 16, 8, 128), Geometry("8B", 32, 8, 128))
CASES = tuple(itertools.product(GEOMETRIES, ("linear", "delta")))
LENGTHS = (8192, 32768, 131072, 1048576)
PLAIN_AT = (32768,)
"""Lengths at which plain PyTorch is measured too. It needs several times the GPU memory, and compiling it takes long."""


def inputs(geometry: Geometry, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random q [1, T, H, D], k and v [1, T, G, D] and zero gates [H] of one row, all with gradients."""
    shapes = [(1, tokens, heads, geometry.width) for heads in (geometry.heads, geometry.groups, geometry.groups)]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v, torch.zeros(geometry.heads, device=device, requires_grad=True)


def rotary_tables(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(geometry.width // 2, device=device) / (geometry.width // 2))
    angle = torch.arange(geometry.segment, device=device)[:, None] * frequencies
    return angle.cos(), angle.sin()


def forward_backward(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a function that runs forward and backward with a fixed gradient of the output."""
    gradient = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, gradient)


def memory_path(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, local: Tensor, geometry: Geometry, rule: str) -> Tensor:
    """Run all steps of `infini_attention` except local attention, with the same kernels.

    Returns:
        The mixed output [1, T, H, D].
    """
    tokens = torch.full((1, -(-q.shape[1] // geometry.segment)), geometry.segment, dtype=torch.int32, device=q.device)
    carried = SegmentMemory(KernelUpdates(k, v, tokens, geometry.segment), None, None, rule, 1e-6).carry()
    assert carried.entering is not None
    return read_and_mix(q, local, gate, *carried.entering, tokens, geometry.segment, False, 1e-6)


def bytes_moved(geometry: Geometry, tokens: int, item: int) -> tuple[int, int]:
    """Return the bytes that the memory path must read and write at least: (forward, backward)."""
    query, key = tokens * geometry.heads * geometry.width * item, tokens * geometry.groups * geometry.width * item
    states = -(-tokens // geometry.segment) * geometry.groups * geometry.width * (geometry.width + 1) * 4
    # Forward: q, k, v, local and out, and the update and the entering state, each written and read once.
    # Backward: q, k, v, local and the output's gradient are read, and four gradients are written. Gradients of both states are
    # written and read, and both states are read.
    return 3 * query + 2 * key + 4 * states, 5 * query + 4 * key + 6 * states


Work = Callable[[], Any]
Makers = dict[str, Callable[[], Work]]


def variants(
    geometry: Geometry, tokens: int, rule: str, device: torch.device, plain_at: tuple[int, ...]
) -> dict[str, Callable[[], Work]]:
    """Return variant -> function that prepares a call to be timed, for all variants measured at this size."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    q, k, v, gate = leaves = inputs(geometry, tokens, device, dtype)
    options: dict[str, Any] = {
        "segment_length": geometry.segment,
        "update_rule": rule,
        "rotary": rotary_tables(geometry, device),
    }

    def whole(operation: Callable[..., Any], backend: str, **more: Any) -> Callable[[], Work]:
        return lambda: forward_backward(lambda: operation(q, k, v, gate, **options, **more, backend=backend)[0], leaves)

    def local_alone() -> Work:
        layout = SegmentLayout.of(tokens, geometry.segment)
        present = tokens_by_segment(None, layout, q, geometry.segment)
        return forward_backward(lambda: local_half(q, k, v, options["rotary"], present, None, layout), (q, k, v))

    def local_deterministic() -> Work:
        """Return local attention as in training with `training.deterministic`."""
        work = local_alone()

        def deterministic() -> None:
            torch.use_deterministic_algorithms(True)
            try:
                work()
            finally:
                torch.use_deterministic_algorithms(False)

        return deterministic

    def memory_alone() -> Work:
        local = torch.randn_like(q).requires_grad_()
        return forward_backward(lambda: memory_path(q, k, v, gate, local, geometry, rule), (*leaves, local))

    def states_forward() -> Work:
        present = torch.full((1, -(-tokens // geometry.segment)), geometry.segment, dtype=torch.int32, device=device)
        return torch.no_grad()(lambda: segment_states(k, v, present, geometry.segment))

    makers: dict[str, Callable[[], Work]] = {
        "local": local_alone,
        "local, deterministic": local_deterministic,
        "memory path": memory_alone,
        "whole": whole(infini_attention, "triton"),
        "states forward": states_forward,
    }
    if tokens in plain_at:
        makers["whole, plain"] = whole(infini_attention, "reference")
        beyond = {"write_gate": torch.zeros_like(k[0, 0]), "feature_map": "softmax"}
        makers["whole, beyond"] = whole(infini_attention, "triton", **beyond)
        if on_gpu and geometry == GEOMETRIES[-1] and rule == "linear":
            makers["whole, torch.compile"] = whole(torch.compile(infini_attention), "reference")
    if on_gpu and rule == "linear" and find_spec("fla"):
        makers["states forward, fla"] = lambda: _fla_states(k, v, geometry.segment)
    return makers


def compile_all(geometry: Geometry, rule: str, device: str = "cuda") -> None:
    """Compile the kernels that `measure` launches into the compilers' disk caches, so that several processes share the work."""
    for tokens in LENGTHS[:2]:  # longer lengths launch the same kernels
        for make in variants(geometry, tokens, rule, torch.device(device), PLAIN_AT).values():
            with suppress(torch.OutOfMemoryError):  # several processes share the GPU
                make()()


def measure_one(
    geometry: Geometry, tokens: int, rule: str, device: torch.device, bandwidth: float, plain_at: tuple[int, ...] = PLAIN_AT
) -> dict[str, Any]:
    """Return the milliseconds of every variant, or None if it ran out of GPU memory or was left out."""
    on_gpu = device.type == "cuda"
    item = 2 if on_gpu else 4
    makers = variants(geometry, tokens, rule, device, plain_at)
    found: dict[str, float | None] = {}
    for name, make in makers.items():
        try:
            found[name] = median_milliseconds(make(), on_gpu)
        except torch.OutOfMemoryError:
            found[name] = None
            gc.collect()  # the traceback holds tensors; without an error, nothing needs collection, which takes long
        if on_gpu:
            torch.cuda.empty_cache()
    floor = 1000 * sum(bytes_moved(geometry, tokens, item)) / bandwidth
    local, memory, total = found["local"], found["memory path"], found["whole"]
    plain, compiled = found.get("whole, plain"), found.get("whole, torch.compile")
    return {
        "geometry": geometry.name,
        "rule": rule,
        "tokens": tokens,
        "local ms": local,
        "local, deterministic ms": found["local, deterministic"],
        "memory ms": memory,
        "floor ms": floor,
        "of copy bandwidth": memory and floor / memory,
        "memory/local": memory and local and memory / local,
        "whole ms": total,
        "learned writes, softmax ms": found.get("whole, beyond"),
        "plain/whole": plain and total and plain / total,
        "compiled/whole": compiled and total and compiled / total,
        "states ms": found["states forward"],
        "fla states ms": found.get("states forward, fla"),
    }


def _fla_states(k: Tensor, v: Tensor, segment: int) -> Work:
    """Return a call that computes the states with flash-linear-attention, which does not apply σ to the keys."""
    from fla.ops.common.chunk_h import chunk_fwd_h

    return torch.no_grad()(lambda: chunk_fwd_h(k, v, g=None, chunk_size=64, split_size=segment, states_in_fp32=True))


def measure(
    geometries: tuple[Geometry, ...] = GEOMETRIES, lengths: tuple[int, ...] = LENGTHS, device: str = "cuda"
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each geometry, rule and length."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    where = torch.device(device)
    bandwidth = copy_bandwidth(where)
    rows = []
    for geometry, rule, tokens in itertools.product(geometries, ("linear", "delta"), lengths):
        rows.append(progress(measure_one(geometry, tokens, rule, where, bandwidth)))
    return rows, [f"copy bandwidth {bandwidth / 1e12:.3f} TB/s; floor: bytes that must move at this rate"]
