"""Attentions that see the segment before: Transformer-XL (arXiv 1901.02860) and a sliding window.

Shapes: B rows, N segments, S segment length, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.rotary import apply_rotary
from infini_train.attention.base import Attention
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.config import ModelConfig


class PreviousSegment(NamedTuple):
    """Keys and values of a row's newest segment."""

    keys: Tensor  # [B, G, S, D], not rotated
    values: Tensor  # [B, G, S, D]
    filled: Tensor  # [B] int64: how many of them are tokens of the document; 0 before its first segment


class PreviousSegmentAttention(Attention):
    """Softmax attention over the tokens of this segment and the one before it, by their distance (rotary embedding)."""

    memory_type: type[LayerMemory] | None = PreviousSegment
    gradient_enters_previous = True
    """Whether gradients flow into the keys and values of the segment before."""

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        cache = CarriedTensor((model.num_query_groups, model.segment_length, model.head_dim))
        return {"keys": cache, "values": cache, "filled": CarriedTensor((), by_head=False, counter=True)}

    def sees_previous(self, segment_length: int, device: torch.device) -> Tensor:
        """Return which tokens of the segment before each token attends to, [S, S] bool."""
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        reset: Tensor,
        lengths: Tensor,
        memory: LayerMemory | None,
        group: ProcessGroup | None = None,
        repeats: Tensor | None = None,
    ) -> tuple[Tensor, LayerMemory | None]:
        B, N = reset.shape
        S, device = self.model.segment_length, q.device
        assert memory is None or isinstance(memory, PreviousSegment)
        if memory is None:
            zeros = k.new_zeros(B, k.shape[2], S, k.shape[3])
            memory = PreviousSegment(zeros, zeros, torch.zeros(B, dtype=torch.int64, device=device))
        reset, lengths = reset.to(device), lengths.to(device)
        keys, values = (x.unflatten(1, (N, S)).transpose(2, 3) for x in (k, v))  # [B, N, G, S, D]
        dtype = torch.promote_types(k.dtype, torch.float32)
        leaving = PreviousSegment(keys[:, -1].to(dtype), values[:, -1].to(dtype), lengths[:, -1].to(torch.int64))
        before = torch.cat([memory.filled.unsqueeze(1), lengths[:, :-1]], dim=1).masked_fill(reset, 0)  # [B, N]
        keys, values = self._with_previous(memory.keys, keys), self._with_previous(memory.values, values)
        if not self.gradient_enters_previous:
            leaving = PreviousSegment(leaving.keys.detach(), leaving.values.detach(), leaving.filled)
        position = torch.arange(S, device=device)
        there = position < before[..., None, None]  # [B, N, 1, S]
        seen = torch.cat(
            [
                there & self.sees_previous(S, device),
                torch.ones(S, S, dtype=torch.bool, device=device).tril().expand(B, N, S, S),
            ],
            dim=-1,
        )  # [B, N, S, 2 S]
        cos, sin = self.rotary(2 * S, device)
        queries = apply_rotary(q.unflatten(1, (N, S)), cos[S:], sin[S:]).flatten(0, 1).transpose(1, 2)  # [BN, H, S, D]
        keys = apply_rotary(keys.transpose(2, 3), cos, sin).transpose(2, 3)
        out = F.scaled_dot_product_attention(
            queries,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            attn_mask=seen.flatten(0, 1).unsqueeze(1),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        out = out.transpose(1, 2).unflatten(0, (B, N)).flatten(1, 2)
        valid = (position < lengths.unsqueeze(-1)).flatten(1)[..., None, None]  # [B, T, 1, 1]
        return out.masked_fill(~valid, 0), leaving

    def _with_previous(self, carried: Tensor, x: Tensor) -> Tensor:
        """[B, G, S, D] and [B, N, G, S, D] -> [B, N, G, 2 S, D], the segment before in front of each."""
        previous = torch.cat([carried.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)
        return torch.cat([previous if self.gradient_enters_previous else previous.detach(), x], dim=3)


class TransformerXLAttention(PreviousSegmentAttention):
    """Attention over the whole segment before, as a cache without gradient (Transformer-XL, Section 3.2).

    The cache holds keys and values, as that of Memorizing Transformers (arXiv 2203.08913) does and as Table 2 of the
    Infini-attention paper counts it. Transformer-XL's holds the layer's input, through which a gradient still reaches the
    projections to keys and values.
    """

    gradient_enters_previous = False

    def sees_previous(self, segment_length: int, device: torch.device) -> Tensor:
        return torch.ones(segment_length, segment_length, dtype=torch.bool, device=device)


class WindowAttention(PreviousSegmentAttention):
    """Attention over the segment_length newest tokens, itself included. Gradients reach all of them."""

    def sees_previous(self, segment_length: int, device: torch.device) -> Tensor:
        return torch.ones(segment_length, segment_length, dtype=torch.bool, device=device).triu(1)
