"""Autograd functions of the memory whose backward saves less than PyTorch's own and passes over the tokens fewer times.

Each saves GPU memory of one number per token and per key or value of a head.

Shapes: W tokens, D key width, Dv value width. Any batch dimensions come first and are the same for all arguments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FeatureMap(torch.autograd.Function):
    """Feature map σ(x) = ELU(x) + 1 = exp(min(x, 0)) + max(x, 0).

    Its derivative is min(σ(x), 1). The products that follow save σ(x) in any case, so it costs nothing to save it here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sigma = x.clamp(max=0).exp_().add_(x.clamp(min=0))
        ctx.save_for_backward(sigma)
        return sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (sigma,) = ctx.saved_tensors
        return sigma.clamp(max=1).mul_(gradient)


class WeightedGrams(torch.autograd.Function):
    """Products X diag(s) X^T of the first n matrices X, for each of several scales s.

    x_t [N, ..., D, W], s [n, ..., 1, W] -> [n, ..., D, D]. n is N in the first scale. With S = (G + G^T) X for the gradient
    G of a result: dX = S diag(s), ds = Σ_D S X / 2.
    """

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_t, *scales)
        return tuple((x_t[: len(scale)] * scale) @ x_t[: len(scale)].transpose(-1, -2) for scale in scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x_t, *scales = ctx.saved_tensors
        x_gradient: Tensor | None = None
        scale_gradients = []
        for gradient, scale in zip(gradients, scales, strict=True):
            x = x_t[: len(scale)]
            symmetric = (gradient + gradient.transpose(-1, -2)) @ x  # [n, ..., D, W]
            scale_gradients.append((symmetric * x).sum(dim=-2, keepdim=True).div_(2))
            if x_gradient is None:
                x_gradient = symmetric.mul_(scale)
            else:
                x_gradient[: len(scale)].addcmul_(symmetric, scale)
        assert x_gradient is not None
        return x_gradient, *scale_gradients


class ScaledProduct(torch.autograd.Function):
    """Product diag(s) X Y: x [..., W, D], s [..., W, 1], y [..., D, Dv] -> [..., W, Dv].

    With P = G Y^T for the gradient G of the result: dX = diag(s) P, dY = X^T diag(s) G, and ds = Σ_D P X. The last equals
    Σ_Dv G (X Y), but does not need X Y.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, y)
        return (x @ y).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, y = ctx.saved_tensors
        product = gradient @ y.transpose(-1, -2)  # [..., W, D]
        scale_gradient = (product * x).sum(dim=-1, keepdim=True)
        return product.mul_(scale), scale_gradient, x.transpose(-1, -2) @ (gradient * scale)
