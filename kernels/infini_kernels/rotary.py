"""Rotary position embedding of local attention (arXiv 2104.09864); rotates halves as Llama does."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head.

    Args:
        x: [..., T, heads, D].
        cos: [T, D/2], or [..., T, D/2] with x's leading dimensions. A constant: it gets no gradient.
        sin: as cos.

    Returns:
        The rotated x in x's type, computed in the wider of the types of x and cos.
    """
    return _Rotation.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))  # [T, 1, D/2]


class _Rotation(torch.autograd.Function):
    """Rotation whose backward is the rotation by the opposite angle, so that autograd does not save x."""

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
    """Return (first cos - second sin, second cos + first sin); direction -1 changes the sign of sin."""
    rotated = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    for source, target in zip(x.chunk(2, dim=-1), rotated.chunk(2, dim=-1), strict=True):
        torch.mul(source, cos, out=target)
    first, second = x.chunk(2, dim=-1)
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin, value=-direction)
    rotated_second.addcmul_(first, sin, value=direction)
    return rotated.to(x.dtype)
