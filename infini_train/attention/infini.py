"""Infini-attention (arXiv 2404.07143): segment-local attention and a compressive memory, mixed by a gate per head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from infini_kernels import MemoryState, SegmentCache, infini_attention, infini_attention_step
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.attention.segment_cache import SegmentCached
from infini_train.config import ModelConfig


class InfiniAttention(SegmentCached):
    """Infini-attention for the heads of this rank.

    Parameters: the gate β [H] and, with `write_strength: learned`, the write gate u [G, D].
    """

    memory_type = MemoryState

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__(model, num_heads, num_groups, context_tokens)
        self.gate = nn.Parameter(torch.full((num_heads,), float(model.initial_gate)))
        learned = model.write_strength == "learned"
        self.write_gate = nn.Parameter(torch.zeros(num_groups, model.head_dim)) if learned else None

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        groups, width = model.num_query_groups, model.head_dim
        return {"M": CarriedTensor((groups, width, model.memory_value_width)), "z": CarriedTensor((groups, width))}

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
        assert memory is None or isinstance(memory, MemoryState)
        return infini_attention(
            q,
            k,
            v,
            self.gate,
            memory,
            segment_length=self.model.segment_length,
            update_rule=self.model.update_rule,
            rotary=self.rotary(self.model.segment_length, q.device),
            reset=reset,
            lengths=lengths,
            first_segment=self.model.first_segment,
            eps=self.model.memory_eps,
            group=group,
            repeats=repeats,
            write_gate=self.write_gate,
            normaliser=self.model.normaliser,
            feature_map=self.model.feature_map,
        )

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache) -> tuple[Tensor, SegmentCache]:
        return infini_attention_step(
            q,
            k,
            v,
            self.gate,
            cache,
            segment_length=self.model.segment_length,
            update_rule=self.model.update_rule,
            rotary=self.rotary(self.model.segment_length, q.device),
            first_segment=self.model.first_segment,
            eps=self.model.memory_eps,
            write_gate=self.write_gate,
            normaliser=self.model.normaliser,
            feature_map=self.model.feature_map,
        )
