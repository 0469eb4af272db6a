"""Rotary position embedding of queries and keys by position in their segment, in one pass that leaves zeros at padding.

Queries and keys go to local attention rotated and to the memory as they are; `with_rotated` sums the two gradients in the pass
that rotates one of them back.

Shapes: B rows, T tokens, N segments, W tokens of a segment, D key width. `tokens` [B, N] int32 says how many of a segment's
tokens are no padding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import by_token, cdiv, launch, next_power_of_2
from infini_kernels.triton.operator import Operator


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, tokens_ptr, beside_ptr, out_ptr,
    x_row, x_token, x_head, beside_row, beside_token, beside_head, T, N, HEADS, W, DIRECTION,
    HALF: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """`beside`, where it is given, is added to what was rotated, at padding too."""
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
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    if beside_ptr is not None:
        other = beside_ptr + b * beside_row + t.to(tl.int64)[:, None] * beside_token + h * beside_head + i[None, :]
        turned_first += tl.load(other, mask=mask, other=0.0).to(tl.float32)
        turned_second += tl.load(other + HALF, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + ((b * T + t.to(tl.int64)[:, None]) * HEADS + h) * 2 * HALF + i[None, :]
    tl.store(out, turned_first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, turned_second.to(out_ptr.dtype.element_ty), mask=mask)


@Operator
def rotate(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int, direction: int) -> Tensor:
    """x [B, T, heads, D], cos and sin [W or more, D/2], tokens [B, N], W -> x rotated; direction -1 rotates it back."""
    return _rotate(x, None, cos, sin, tokens, width, direction)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int, direction: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@Operator
def rotated_back_and_added(x: Tensor, beside: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int) -> Tensor:
    """x rotated back, plus `beside` [B, T, heads, D]; rounded once. No gradients."""
    return _rotate(x, beside, cos, sin, tokens, width, -1)


@rotated_back_and_added.register_fake
def _(x: Tensor, beside: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rotate(x: Tensor, beside: Tensor | None, cos: Tensor, sin: Tensor, tokens: Tensor, width: int, direction: int) -> Tensor:
    (B, T, heads, D), N = x.shape, tokens.shape[1]
    x, strides = by_token(x)
    beside, beside_strides = (None, (0, 0, 0)) if beside is None else by_token(beside)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BH = next_power_of_2(D // 2)
    BT = max(1, 4096 // BH)
    launch(
        _rotary_kernel, (B, heads, cdiv(T, BT)),
        x, cos.contiguous(), sin.contiguous(), tokens, beside, out, *strides, *beside_strides, T, N, heads, width, direction,
        HALF=D // 2, BT=BT, BH=BH,
    )  # fmt: skip
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, tokens, ctx.width, ctx.direction = inputs
    ctx.save_for_backward(cos, sin, tokens)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(gradient, *ctx.saved_tensors, ctx.width, -ctx.direction), None, None, None, None, None


rotate.register_autograd(_backward, setup_context=_save)


class _WithRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, tokens)
        ctx.width = width
        return x.view_as(x), rotate(x, cos, sin, tokens, width, 1)

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, rotated: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, tokens = ctx.saved_tensors
        if rotated is None:
            return beside, None, None, None, None
        if beside is None:
            return rotate(rotated, cos, sin, tokens, ctx.width, -1), None, None, None, None
        return rotated_back_and_added(rotated, beside, cos, sin, tokens, ctx.width), None, None, None, None


def with_rotated(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x as it is, and rotated as by `rotate`; the gradients of both reach x as one sum, made in one pass."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _WithRotated.apply(x, cos, sin, tokens, width)
    return x, rotate(x, cos, sin, tokens, width, 1)
