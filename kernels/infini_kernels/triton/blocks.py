"""Code shared by all kernels: block sizes, precision of products, and device functions.

Each sum is computed by one program in a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Python on the CPU (TRITON_INTERPRET=1)."""
SMALLEST = 16
"""Smallest side of a block in a matrix product."""
WIDEST_HEAD = 256


@triton.jit
def load_state(state_ptr, first, d, e, D: tl.constexpr, DV: tl.constexpr):
    """Load rows d and columns e of the state [D, DV] whose first row is `first`."""
    return tl.load(
        state_ptr + first * DV + (d[:, None] * DV + e[None, :]), mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0
    )


@triton.jit
def halves(x):
    """Split float32 x into the sum of two bfloat16 numbers, which keeps 16 of its bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b, for results that are rounded to the type of the tokens.

    PRECISION is the result of `dot_precision`. 'bf16' rounds a and b to bfloat16. 'emulated' does the same under the
    interpreter, which has no bfloat16 products. Other values are precisions of Triton for float32.
    """
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "emulated":
        acc = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def high_half(x, PRECISION: tl.constexpr):
    """Convert float32 x to the input type of `dot`."""
    return x.to(tl.bfloat16) if PRECISION == "bf16" else x


@triton.jit
def rounded(a, PRECISION: tl.constexpr):
    """Round float32 a as `dot` does."""
    if PRECISION == "bf16" or PRECISION == "emulated":
        a = a.to(tl.bfloat16).to(tl.float32)
    return a


@triton.jit
def dot_exact(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b for float32 a, and b in the type of its tensor, with the accuracy of float32.

    PRECISION is the result of `exact_dot_precision`. 'bf16' multiplies both halves of a as bfloat16, the type of b, at
    twice the cost of one such product. 'emulated' does the same under the interpreter, which has no bfloat16 products.
    Other values are precisions of Triton.
    """
    if PRECISION == "bf16" or PRECISION == "emulated":
        high, low = halves(a)
        acc = dot(low, b, dot(high, b, acc, PRECISION), PRECISION)
    else:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_exact_both(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b for float32 a and b, with the accuracy of float32. PRECISION is as for `dot_exact`."""
    if PRECISION == "bf16" or PRECISION == "emulated":
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        acc = dot(a_high, b_low, dot(a_low, b_high, acc, PRECISION), PRECISION)
        acc = dot(a_high, b_high, acc, PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Launch a kernel on the device of its first argument.

    All kernels are launched here, so that `observers` can compile the kernels of a GPU without having one.
    """
    if observers:
        observers[-1](kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages}, constants)
        return
    device = arguments[0].device
    # Triton launches on the current device, which may not be that of the tensors.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


observers: list[Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, int], dict[str, Any]], None]] = []
"""Functions that replace a launch. If there are any, `launch` calls the last one instead of the device."""


def exact_dot_precision(dtype: torch.dtype) -> str:
    """Return PRECISION of `dot_exact` for tokens of this type.

    float16 is not split in halves, because that would lose σ(k) of keys below -17.
    """
    if dtype == torch.bfloat16:
        return "emulated" if INTERPRETED else "bf16"
    return "tf32x3" if dtype == torch.float16 else "ieee"


def dot_precision(dtype: torch.dtype) -> str:
    """Return PRECISION of `dot` for tokens of this type.

    float16 products are not used, because float16 cannot hold the sums in a memory.
    """
    if dtype == torch.bfloat16:
        return "emulated" if INTERPRETED else "bf16"
    return "tf32" if dtype == torch.float16 else "ieee"


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. On the host this is many times as fast as Triton's function, which also works in kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def block(width: int, largest: int = WIDEST_HEAD) -> int:
    """Return the block size for a dimension of this width."""
    return min(largest, max(SMALLEST, next_power_of_2(width)))


SHARED_MEMORY = 160_000
"""Bytes of shared memory per block on an A100 and later data-centre GPUs. Other GPUs have about 100,000."""


@torch.compiler.assume_constant_result
@functools.cache
def _has_little_shared_memory(device_index: int) -> bool:
    properties = torch.cuda.get_device_properties(device_index)
    return getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY) < SHARED_MEMORY


def needs_much_shared_memory(dtype: torch.dtype, widest: int) -> bool:
    """Return whether kernels for heads of this width need more shared memory than small GPUs have.

    benchmarks/compiled.py prints the bytes.
    """
    return dtype == torch.bfloat16 and widest > 64


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether there are kernels for these tensors, whose last dimension is the head width."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    widest = max(q.shape[-1], v.shape[-1])
    if q.is_cuda and needs_much_shared_memory(q.dtype, widest) and _has_little_shared_memory(q.device.index):
        return False
    return (
        widest <= WIDEST_HEAD
        and q.dtype in types
        and q.dtype == k.dtype == v.dtype
        and (q.is_cuda or INTERPRETED or bool(observers))
    )


MOST_IN_32_BITS = 2**31 - 1
"""Largest offset from the first token and head of a segment, for kernels with 32-bit offsets."""


def by_token(x: Tensor, width: int = 1) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x [B, T, heads, D] with a contiguous last dimension, and its other strides.

    x is copied if its last dimension is not contiguous, or if offsets within a segment do not fit in 32 bits. The latter
    happens if consecutive tokens are far apart (very many rows) or if heads are (each head holds all its tokens).

    Args:
        x: [B, T, heads, D].
        width: tokens of a segment, for a kernel that counts from the segment's first token in 32 bits.

    Raises:
        ValueError: a single segment is too large for 32-bit offsets.
    """
    if x.stride(-1) != 1 or _reach(x, width) > MOST_IN_32_BITS:
        x = x.contiguous()
        if _reach(x, width) > MOST_IN_32_BITS:
            raise ValueError(
                f"a segment has {width} tokens of {x.shape[2]} heads of {x.shape[3]}, but the kernels support at most 2^31 "
                "numbers per segment: write backend='reference', or use a smaller segment_length"
            )
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _reach(x: Tensor, width: int) -> int:
    """Return the largest offset from a segment's first token and first head, plus one."""
    return (width - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) + x.shape[-1]


class Tile(NamedTuple):
    """Tile of a program: tokens of a block, value columns of a step, warps, and stages of the pipelined loads."""

    tokens: int
    columns: int
    warps: int
    stages: int = 2


def tile(head_width: int, dtype: torch.dtype, plain: bool = True) -> Tile:
    """Return the tile of kernels whose blocks span a head.

    It is the fastest on an H100 (benchmarks/tiles.py) of the largest tiles that do not spill registers on sm_80 and sm_90
    (benchmarks/compiled.py).

    Args:
        head_width: width of a head.
        dtype: type of the tokens.
        plain: ELU + 1 and writes of strength 1, which need fewer registers.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 8 if head_width <= 64 or (head_width <= 128 and not plain) else 4 if head_width <= 128 else 8)
    if dtype == torch.bfloat16 and head_width <= 128:
        return Tile(64 if plain else 32, 128, 4 if head_width <= 64 else 8, 3)
    return Tile(16 if head_width > 128 else 64 if plain else 32, 32, 4 if head_width <= 64 else 8)


TOKENS_OF_A_PROGRAM = 2048
"""Largest number of tokens for which a program keeps a whole state after one read."""
WARPS_OF_A_FULL_CARD = 1024
"""Number of warps that keep the 132 multiprocessors of an H100 busy.

With fewer warps, as in micro-batches of few segments, a program takes fewer tokens, although the state is then read more
often: 512 tokens instead of 2,048 cost 6 to 8% more time on a GPU that is busy anyway (benchmarks/tiles.py).
"""


def blocks_of_a_program(width: int, block_tokens: int, segments: int, warps: int) -> int:
    """Return the number of token blocks that a program processes in sequence within a segment.

    Args:
        width: tokens of a segment.
        block_tokens: tokens of a block.
        segments: number of segments over all rows and heads, which have separate programs.
        warps: warps of a program.
    """
    programs = cdiv(WARPS_OF_A_FULL_CARD, warps * segments)
    tokens = min(TOKENS_OF_A_PROGRAM, cdiv(width, max(1, programs)))
    return min(cdiv(width, block_tokens), cdiv(tokens, block_tokens))


def sum_tile(head_width: int, value_width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return the tile of kernels that sum a state over tokens.

    Returns:
        Tokens of a step, key columns and value columns of the state, and warps.
    """
    if dtype == torch.float32:
        return 32, block(head_width, 64), block(value_width, 32), 4
    if dtype == torch.float16:
        return 32, block(head_width, 128), block(value_width, 64), 8
    return 64, block(head_width, 64), block(value_width, 128), 4


def on_hopper(x: Tensor) -> bool:
    """Return whether x is on a GPU of compute capability 9 or later. Without a GPU, `compiled_for` decides."""
    return (torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else compiled_for[-1] // 10) >= 9


compiled_for = [90]
"""Compute capabilities for which kernels are compiled without a GPU. The last one counts."""
