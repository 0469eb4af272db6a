"""Baselines that also attend to the previous segment: Transformer-XL (arXiv 1901.02860) and a sliding window.

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
    filled: Tensor  # [B] int64: number of positions that hold tokens of the document; 0 before its first segment


class PreviousSegmentAttention(Attention):
    """Softmax attention over the current and the previous segment, with rotary embedding by token distance."""

    memory_type: type[LayerMemory] | None = PreviousSegment
    gradient_enters_previous = True
    """True if gradients flow from a segment to the keys and values of the previous one."""

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        cache = CarriedTensor((model.num_query_groups, model.segment_length, model.head_dim))
        return {"keys": cache, "values": cache, "filled": CarriedTensor((), by_head=False, counter=True)}

    def previous_segment_mask(self, segment_length: int, device: torch.device) -> Tensor:
        """Return the mask [S, S] bool, True where a token of this segment attends to a token of the previous one."""
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
                there & self.previous_segment_mask(S, device),
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
        """Put the previous segment before each segment: [B, G, S, D] and [B, N, G, S, D] -> [B, N, G, 2 S, D]."""
        previous = torch.cat([carried.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)
        return torch.cat([previous if self.gradient_enters_previous else previous.detach(), x], dim=3)


class TransformerXLAttention(PreviousSegmentAttention):
    """Attention to the whole previous segment, as a cache without gradient (Transformer-XL, Section 3.2).

    The cache holds keys and values, as in Memorizing Transformers (arXiv 2203.08913) and as counted in Table 2 of the
    Infini-attention paper. The cache of Transformer-XL itself holds the layer's input, so that a gradient still reaches the
    key and value projections.
    """

    gradient_enters_previous = False

    def previous_segment_mask(self, segment_length: int, device: torch.device) -> Tensor:
        return torch.ones(segment_length, segment_length, dtype=torch.bool, device=device)


class WindowAttention(PreviousSegmentAttention):
    """Sliding window: a token attends to the newest `segment_length` tokens, itself included, with gradients to all of them."""

    def previous_segment_mask(self, segment_length: int, device: torch.device) -> Tensor:
        return torch.ones(segment_length, segment_length, dtype=torch.bool, device=device).triu(1)
