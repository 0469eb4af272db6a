"""Megatron-core's self-attention with one autograd function for the split into queries, keys and values.

Shapes: T tokens, B rows, H query heads and G key/value heads of this rank, R = H / G, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.backend import uses_triton


class SplitHeads(torch.autograd.Function):
    """Split mixed [T, B, G (R + 2) D] into q [T, B, H, D], a copy, and k and v [T, B, G, D], views."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        by_group = mixed.unflatten(2, (groups, -1, width))
        q, k, v = by_group[..., :-2, :], by_group[..., -2, :], by_group[..., -1, :]
        return q.flatten(2, 3), k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None]:
        if uses_triton("auto", q, k, v):
            from infini_kernels.triton.heads import join_heads

            return join_heads(q, k, v), None, None
        groups = k.shape[2]
        return torch.cat([q.unflatten(2, (groups, -1)), k.unsqueeze(3), v.unsqueeze(3)], dim=3).flatten(2), None, None


class SplitSelfAttention(SelfAttention):
    """Self-attention without query/key norms and output gate. Validation ensures that a group's heads are all on one rank."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Project hidden_states [T, B, h] to q [T, B, H, D], k and v [T, B, G, D]."""
        mixed, _ = self.linear_qkv(hidden_states)
        return SplitHeads.apply(mixed, self.num_query_groups_per_partition, self.hidden_size_per_attention_head)
