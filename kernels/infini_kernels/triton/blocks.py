"""What all kernels share: block sizes, precision of products, and pieces of device code.

Every sum is one program's own, in one order: same inputs, same bits.
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
    """Rows d and columns e of the state [D, DV] whose first row is `first`."""
    return tl.load(
        state_ptr + first * DV + (d[:, None] * DV + e[None, :]), mask=(d < D)[:, None] & (e < DV)[None, :], other=0.0
    )


@triton.jit
def halves(x):
    """x in float32 as the sum of two bfloat16 numbers, of which it keeps 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, for results that are rounded to the type of the tokens.

    PRECISION (`dot_precision`): 'bf16' rounds both to bfloat16; 'emulated' does the same where the interpreter knows no bfloat16
    products; else a precision of Triton's for float32.
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
    """Float32 x as `dot` takes it."""
    return x.to(tl.bfloat16) if PRECISION == "bf16" else x


@triton.jit
def rounded(a, PRECISION: tl.constexpr):
    """Float32 a as `dot` rounds it."""
    if PRECISION == "bf16" or PRECISION == "emulated":
        a = a.to(tl.bfloat16).to(tl.float32)
    return a


@triton.jit
def dot_exact(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for float32 a, and b as it was read, as exact as in float32.

    PRECISION (`exact_dot_precision`): 'bf16' multiplies both halves of a as bfloat16, the type of b, at twice the cost of one such product;
    'emulated' does the same where the interpreter knows no bfloat16 products; else a precision of Triton's.
    """
    if PRECISION == "bf16" or PRECISION == "emulated":
        high, low = halves(a)
        acc = dot(low, b, dot(high, b, acc, PRECISION), PRECISION)
    else:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_exact_both(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for float32 a and b, as exact as in float32; PRECISION as for `dot_exact`."""
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
    """Every kernel starts here, so that what is compiled for a card can be asked for where there is none."""
    if observers:
        observers[-1](kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages}, constants)
        return
    device = arguments[0].device
    # Triton launches on the current device, wherever the tensors are.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


observers: list[Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, int], dict[str, Any]], None]] = []
"""The last of them, if there is one, takes a launch in place of the device."""


def exact_dot_precision(dtype: torch.dtype) -> str:
    """PRECISION of `dot_exact` for tokens of this type. Halves of float16 would lose σ(k) of keys below -17."""
    if dtype == torch.bfloat16:
        return "emulated" if INTERPRETED else "bf16"
    return "tf32x3" if dtype == torch.float16 else "ieee"


def dot_precision(dtype: torch.dtype) -> str:
    """PRECISION of `dot` for tokens of this type. Float16 would not hold the sums in a memory."""
    if dtype == torch.bfloat16:
        return "emulated" if INTERPRETED else "bf16"
    return "tf32" if dtype == torch.float16 else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, takes the host many times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def block(width: int, largest: int = WIDEST_HEAD) -> int:
    """A block's side for a dimension of this width."""
    return min(largest, max(SMALLEST, next_power_of_2(width)))


SHARED_MEMORY = 160_000
"""Bytes that a block may have on an A100 and later cards of its kind; other cards have about 100,000."""


@torch.compiler.assume_constant_result
@functools.cache
def _has_little_shared_memory(device_index: int) -> bool:
    properties = torch.cuda.get_device_properties(device_index)
    return getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY) < SHARED_MEMORY


def needs_much_shared_memory(dtype: torch.dtype, widest: int) -> bool:
    """Whether kernels for heads of this width are too large for cards with little; benchmarks/compiled.py has the bytes."""
    return dtype == torch.bfloat16 and widest > 64


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these tensors (last dimension the width of a head)."""
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
"""Numbers from a segment's first token on, and from the first head, for kernels that count them in 32 bits."""


def by_token(x: Tensor, width: int = 1) -> tuple[Tensor, tuple[int, int, int]]:
    """x [B, T, heads, D] with its last dimension contiguous, and its other strides.

    Args:
        width: tokens of a segment, for a kernel that counts on from its first in 32 bits. Where they lie too far from each
            other for that, as among very many rows, or the heads do, as where each has all of its tokens, x is copied.

    Raises:
        ValueError: one segment alone has too many numbers for that.
    """
    if x.stride(-1) != 1 or _reach(x, width) > MOST_IN_32_BITS:
        x = x.contiguous()
        if _reach(x, width) > MOST_IN_32_BITS:
            raise ValueError(
                f"a segment has {width} tokens of {x.shape[2]} heads of {x.shape[3]}, and the kernels count at most 2^31 "
                "numbers in one: write backend='reference', or a smaller segment_length"
            )
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _reach(x: Tensor, width: int) -> int:
    """The farthest number that a kernel counts to from a segment's first, and from the first head."""
    return (width - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) + x.shape[-1]


class Tile(NamedTuple):
    """Tokens of a block, value columns of a step, warps, and stages of the loads' pipeline."""

    tokens: int
    columns: int
    warps: int
    stages: int = 2


def tile(head_width: int, dtype: torch.dtype, plain: bool = True) -> Tile:
    """For kernels whose blocks span a head.

    As large as registers hold without spilling on sm_80 and sm_90 (benchmarks/compiled.py), and of those the fastest on an H100
    (benchmarks/tiles.py).

    Args:
        plain: ELU + 1 and writes of strength 1, which take fewer registers.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 8 if head_width <= 64 or (head_width <= 128 and not plain) else 4 if head_width <= 128 else 8)
    if dtype == torch.bfloat16 and head_width <= 128:
        return Tile(64 if plain else 32, 128, 4 if head_width <= 64 else 8, 3)
    return Tile(16 if head_width > 128 else 64 if plain else 32, 32, 4 if head_width <= 64 else 8)


TOKENS_OF_A_PROGRAM = 2048
"""Most tokens for which a program keeps a state that it has read whole."""
WARPS_OF_A_FULL_CARD = 1024
"""Warps that give an H100's 132 multiprocessors enough to do. With fewer, as in micro-batches of few segments, a program takes
fewer tokens, though the state is then read more often: for 512 tokens instead of 2,048 that takes 6 to 8% longer on a card that
is full anyway (benchmarks/tiles.py)."""


def blocks_of_a_program(width: int, block_tokens: int, segments: int, warps: int) -> int:
    """Blocks of tokens that a program takes one after the other in a segment of this width.

    Args:
        segments: of all rows and heads, which have programs of their own.
        warps: of a program.
    """
    programs = cdiv(WARPS_OF_A_FULL_CARD, warps * segments)
    tokens = min(TOKENS_OF_A_PROGRAM, cdiv(width, max(1, programs)))
    return min(cdiv(width, block_tokens), cdiv(tokens, block_tokens))


def sum_tile(head_width: int, value_width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """For kernels that sum up a state over tokens: tokens of a step, key and value columns of the state, and warps."""
    if dtype == torch.float32:
        return 32, block(head_width, 64), block(value_width, 32), 4
    if dtype == torch.float16:
        return 32, block(head_width, 128), block(value_width, 64), 8
    return 64, block(head_width, 64), block(value_width, 128), 4


def on_hopper(x: Tensor) -> bool:
    """Whether x lies on a card of compute capability 9 or later; `compiled_for` says so where there is no card."""
    return (torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else compiled_for[-1] // 10) >= 9


compiled_for = [90]
"""The last of them is the compute capability for which kernels are compiled without a card."""
