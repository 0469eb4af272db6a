"""Rotary position embedding of queries and keys by position in their segment, in one pass that leaves zeros at padding.

Shapes: B rows, T tokens, N segments, W tokens of a segment, D key width. `tokens` [B, N] int32 says how many of a segment's
tokens are no padding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import by_token, launch


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, tokens_ptr, out_ptr, x_row, x_token, x_head, T, N, HEADS, W, DIRECTION,
    HALF: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    n = t // W
    w = t - n * W
    i = tl.arange(0, BH)
    inside, in_i = t < T, i < HALF
    here = w < tl.load(tokens_ptr + b * N + n, mask=inside, other=0)
    mask = inside[:, None] & in_i[None, :]
    read = here[:, None] & mask
    at = x_ptr + b * x_row + t.to(tl.int64)[:, None] * x_token + h * x_head + i[None, :]
    first = tl.load(at, mask=read, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=read, other=0.0).to(tl.float32)
    angle = w[:, None] * HALF + i[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32) * DIRECTION
    out = out_ptr + ((b * T + t.to(tl.int64)[:, None]) * HEADS + h) * 2 * HALF + i[None, :]
    tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("infini_kernels::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int, direction: int) -> Tensor:
    """x [B, T, heads, D], cos and sin [W or more, D/2], tokens [B, N], W -> x rotated; direction -1 rotates it back."""
    (B, T, heads, D), N = x.shape, tokens.shape[1]
    x, strides = by_token(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BH = triton.next_power_of_2(D // 2)
    BT = max(1, 4096 // BH)
    launch(
        _rotary_kernel, (B, heads, triton.cdiv(T, BT)),
        x, cos.contiguous(), sin.contiguous(), tokens, out, *strides, T, N, heads, width, direction,
        HALF=D // 2, BT=BT, BH=BH,
    )  # fmt: skip
    return out


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int, direction: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, tokens, ctx.width, ctx.direction = inputs
    ctx.save_for_backward(cos, sin, tokens)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(gradient, *ctx.saved_tensors, ctx.width, -ctx.direction), None, None, None, None, None


rotate.register_autograd(_backward, setup_context=_save)
