"""SwiGLU (arXiv 2002.05202), with one pass each for forward and backward.

torch.compile makes an equally fast kernel, but its calls cost the host several times as much.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.triton.blocks import cdiv, launch

BLOCK = 1024
"""Columns per program."""


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(x_ptr + row * 2 * F + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + f, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, x_ptr, dx_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    grad = tl.load(grad_ptr + row * F + f, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * F + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + f, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = grad * up * share * (1 + gate * (1 - share))
    tl.store(dx_ptr + row * 2 * F + f, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + row * 2 * F + F + f, (grad * gate * share).to(dx_ptr.dtype.element_ty), mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        width = out.shape[-1]
        launch(_swiglu_kernel, (out.numel() // width, cdiv(width, BLOCK)), x, out, width, BLOCK=BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        width = grad.shape[-1]
        launch(_swiglu_backward_kernel, (grad.numel() // width, cdiv(width, BLOCK)), grad, x, dx, width, BLOCK=BLOCK)
        return dx


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up for the halves of x, [..., 2 F] -> [..., F].

    It computes in float32 and rounds once. Autograd saves only x.
    """
    return _SwiGLU.apply(x)
