"""The SwiGLU feed-forward layer (arXiv 2002.05202) with Megatron-core's parallel linear layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up, where gate and up are the halves of x: [..., 2 f] -> [..., f].

    Only x is saved for the backward: silu(gate) is as large as the output and cheap to recompute.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        input_gradient = torch.empty_like(x)
        gate_gradient, up_gradient = input_gradient.chunk(2, dim=-1)
        # Each step writes into the result: a temporary would be as large as the layer's largest activations.
        torch.mul(gradient, up, out=gate_gradient)
        torch.ops.aten.silu_backward.grad_input(gate_gradient, gate, grad_input=gate_gradient)
        torch.ops.aten.silu.out(gate, out=up_gradient)
        up_gradient.mul_(gradient)
        return input_gradient


class FeedForward(MLP):
    """Megatron-core's MLP with `SwiGLU` between fc1 and fc2, without biases."""

    @staticmethod
    def join(halves: Tensor) -> Tensor:
        """Apply SwiGLU: [..., 2 f] -> [..., f]."""
        return SwiGLU.apply(halves)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output for hidden_states [T, B, h] in the same shape, and None for the bias."""
        assert per_token_scale is None, "only experts scale tokens"
        halves, _bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.join(halves))
