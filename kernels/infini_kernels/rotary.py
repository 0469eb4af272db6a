"""Rotary position embedding of the local attention (arXiv 2104.09864), halves rotated as in Llama."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of every head.

    x [..., T, heads, D]; cos and sin [T, D/2], or [..., T, D/2] with x's first dimensions. Computed in the wider of the two
    types, returned in x's. The tables are constants: they get no gradient.
    """
    return _Rotation.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))  # [T, 1, D/2]


class _Rotation(torch.autograd.Function):
    """Its backward is the rotation by the opposite angle, so that nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """(first cos - second sin, second cos + first sin), with sin's sign turned for direction -1."""
    rotated = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    for source, target in zip(x.chunk(2, dim=-1), rotated.chunk(2, dim=-1), strict=True):
        torch.mul(source, cos, out=target)
    first, second = x.chunk(2, dim=-1)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin, value=-direction)
    rotated_second.addcmul_(first, sin, value=direction)
    return rotated.to(x.dtype)
