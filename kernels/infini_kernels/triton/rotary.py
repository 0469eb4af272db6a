"""Rotary position embedding of queries and keys, by position in the segment, in one pass that zeroes padding.

Local attention gets queries and keys rotated, and the memory gets them unchanged. `with_rotated` sums the two gradients in
the pass that rotates one of them back. Queries and keys share one launch, because a launch costs the host more time than
the device.

Shapes: B rows, T tokens, N segments, W tokens of a segment, H query heads, G key heads, D key width. `tokens` [B, N] int32
is the number of valid (not padding) tokens of each segment.
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
    q_ptr, k_ptr, cos_ptr, sin_ptr, tokens_ptr, addend_q_ptr, addend_k_ptr, out_q_ptr, out_k_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head,
    addend_q_row, addend_q_token, addend_q_head, addend_k_row, addend_k_token, addend_k_head, T, N, H, G, W, DIRECTION,
    HALF: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Rotate q and k. If `addend_q` and `addend_k` are given, add them to the rotated tensors, at padding too."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)  # the only grid dimension that may exceed 65,535
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    n = t // W
    w = t - n * W
    i = tl.arange(0, BH)
    inside, in_i = t < T, i < HALF
    here = w < tl.load(tokens_ptr + b * N + n, mask=inside, other=0)
    mask = inside[:, None] & in_i[None, :]
    read = here[:, None] & mask
    angle = w[:, None] * HALF + i[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32) * DIRECTION
    token = t.to(tl.int64)[:, None]
    if head < H:
        q_at = q_ptr + b * q_row + token * q_token + head * q_head + i[None, :]
        q_other = addend_q_ptr
        if addend_q_ptr is not None:
            q_other += b * addend_q_row + token * addend_q_token + head * addend_q_head + i[None, :]
        q_out = out_q_ptr + ((b * T + token) * H + head) * 2 * HALF + i[None, :]
        _turn(q_at, q_other, q_out, cos, sin, read, mask, HALF)
    else:
        g = head - H
        k_at = k_ptr + b * k_row + token * k_token + g * k_head + i[None, :]
        k_other = addend_k_ptr
        if addend_k_ptr is not None:
            k_other += b * addend_k_row + token * addend_k_token + g * addend_k_head + i[None, :]
        k_out = out_k_ptr + ((b * T + token) * G + g) * 2 * HALF + i[None, :]
        _turn(k_at, k_other, k_out, cos, sin, read, mask, HALF)


@triton.jit
def _turn(at, other, out, cos, sin, read, mask, HALF: tl.constexpr):
    """Rotate the numbers at `at`, add those at `other` unless it is None, and store the result at `out`."""
    first = tl.load(at, mask=read, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=read, other=0.0).to(tl.float32)
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    if other is not None:
        turned_first += tl.load(other, mask=mask, other=0.0).to(tl.float32)
        turned_second += tl.load(other + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, turned_first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF, turned_second.to(out.dtype.element_ty), mask=mask)


@Operator
def rotate(
    q: Tensor,
    k: Tensor,
    addend_q: Tensor | None,
    addend_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    tokens: Tensor,
    width: int,
    direction: int,
) -> tuple[Tensor, Tensor]:
    """Rotate q [B, T, H, D] and k [B, T, G, D] by cos and sin [W or more, D/2].

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D].
        addend_q: added to the rotated q, with the shape of q; the sum is rounded once. None for nothing.
        addend_k: the same for k.
        cos: [W or more, D/2].
        sin: as cos.
        tokens: [B, N] int32.
        width: W.
        direction: 1, or -1 to rotate back.

    Returns:
        Rotated q and k.
    """
    (B, T, H, D), G, N = q.shape, k.shape[2], tokens.shape[1]
    (q, q_strides), (k, k_strides) = by_token(q), by_token(k)
    addend_q, addend_q_strides = (None, (0, 0, 0)) if addend_q is None else by_token(addend_q)
    addend_k, addend_k_strides = (None, (0, 0, 0)) if addend_k is None else by_token(addend_k)
    out_q, out_k = _like(q, k)
    BH = next_power_of_2(D // 2)
    BT = max(1, 4096 // BH)
    launch(
        _rotary_kernel, (cdiv(T, BT), H + G, B),
        q, k, cos.contiguous(), sin.contiguous(), tokens, addend_q, addend_k, out_q, out_k,
        *q_strides, *k_strides, *addend_q_strides, *addend_k_strides, T, N, H, G, width, direction,
        HALF=D // 2, BT=BT, BH=BH,
    )  # fmt: skip
    return out_q, out_k


def _like(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@rotate.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q, k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, addend_q, addend_k, cos, sin, tokens, ctx.width, ctx.direction = inputs
    ctx.has_addend = addend_q is not None, addend_k is not None
    ctx.save_for_backward(cos, sin, tokens)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    back = rotate(dq, dk, None, None, *ctx.saved_tensors, ctx.width, -ctx.direction)
    return *back, *(each if given else None for each, given in zip((dq, dk), ctx.has_addend, strict=True)), *[None] * 5


rotate.register_autograd(_backward, setup_context=_save)


class _WithRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, tokens)
        ctx.width = width
        return q.view_as(q), k.view_as(k), *rotate(q, k, None, None, cos, sin, tokens, width, 1)

    @staticmethod
    def backward(ctx: Any, addend_q: Tensor, addend_k: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *rotate(dq, dk, addend_q, addend_k, *ctx.saved_tensors, ctx.width, -1), None, None, None, None


def with_rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q and k unchanged, and both rotated as by `rotate`.

    In the backward, one pass sums the two gradients of each.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _WithRotated.apply(q, k, cos, sin, tokens, width)
    return q, k, *rotate(q, k, None, None, cos, sin, tokens, width, 1)
