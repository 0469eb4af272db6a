"""Feature maps inside the kernels: ELU + 1, and softmax(2 x) (`variants.sharp_features`) as exp(2 x - shift).

`shift` [B, T, heads] float32 is the logarithm of the softmax's denominator. With it σ of one number does not depend on
others, so that a kernel may hold only some columns of a head. Without a shift (a null pointer, known at compile time)
kernels compute ELU + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import block, by_token, cdiv, launch
from infini_kernels.triton.operator import Operator


@triton.jit
def sigma(x, shift_ptr, places, here):
    """Return σ(x) in float32.

    places are the offsets of the tokens in `shift`, and here tells which of them may be read. Both broadcast to x.
    """
    x = x.to(tl.float32)
    if shift_ptr is None:
        features = tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)
    else:
        features = tl.exp(2 * x - tl.load(shift_ptr + places, mask=here, other=0.0))
    return features


@triton.jit
def sigma_backward(gradient, s, shift_ptr):
    """Return the gradient of x [tokens, D] from that of s = σ(x), for whole heads. It is zero where s is zero."""
    dx = gradient * tl.minimum(s, 1.0)
    if shift_ptr is not None:
        dx = 2 * s * (gradient - tl.sum(gradient * s, axis=1)[:, None])
    return dx


@triton.jit
def _shift_kernel(
    x_ptr, shift_ptr, x_row, x_token, x_head, T, H, D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = (tl.program_id(0) * BW + tl.arange(0, BW)).to(tl.int64)
    d = tl.arange(0, BD)
    inside, row = t < T, row.to(tl.int64)
    x = x_ptr + row * x_row + t[:, None] * x_token + h * x_head + d[None, :]
    x = 2 * tl.load(x, mask=inside[:, None] & (d < D)[None, :], other=float("-inf")).to(tl.float32)
    largest = tl.max(tl.where(inside[:, None], x, 0.0), axis=1)
    total = tl.where(inside, tl.sum(tl.exp(x - largest[:, None]), axis=1), 1.0)
    tl.store(shift_ptr + (row * T + t) * H + h, largest + tl.log(total), mask=inside)


@Operator
def softmax_shift(x: Tensor) -> Tensor:
    """Return log Σ exp(2 x) over the last dimension: x [B, T, heads, D] -> [B, T, heads] float32.

    It has no gradient of its own, because `sigma_backward` includes it.
    """
    B, T, H, D = x.shape
    x, strides = by_token(x)
    shift = torch.empty(B, T, H, dtype=torch.float32, device=x.device)
    BW = block(T, 64)
    launch(_shift_kernel, (cdiv(T, BW), B * H), x, shift, *strides, T, H, D=D, BW=BW, BD=block(D))
    return shift


@softmax_shift.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.float32)
