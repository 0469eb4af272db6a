"""RMSNorm for Megatron-core's layer spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNormOnHost(torch.autograd.Function):
    """Compute x / rms(x) * weight and save only x and one value per token for the backward.

    The CPU has no fused norm: torch composes it of five operations and also saves the normalised x.
    Shapes: x [..., h], weight [h] -> [..., h] in the dtype of x, computed in float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute, with r = 1 / rms(x) and a = Σ_h g w x: dx = r (g w - x r² a / h), dw = Σ_tokens g x r."""
        x, weight, inverse_rms = ctx.saved_tensors
        dtype = inverse_rms.dtype
        wide, wide_weight, gradient = x.to(dtype), weight.to(dtype), gradient.to(dtype)
        product = (gradient * wide).flatten(0, -2)  # [tokens, h]
        along = (product @ wide_weight).view_as(inverse_rms)  # a
        weight_gradient = inverse_rms.flatten() @ product
        input_gradient = (gradient * wide_weight).mul_(inverse_rms)
        input_gradient.addcmul_(wide, along.mul_(inverse_rms.pow(3)), value=-1 / x.shape[-1])
        return input_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron-core calls (Megatron-core's wrapper refuses sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] over its last dimension."""
        if x.is_cuda:  # torch has a fused norm for CUDA
            return super().forward(x)
        return RMSNormOnHost.apply(x, self.weight, self.eps)
