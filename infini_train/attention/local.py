"""Baseline: causal attention within each segment, without any link between segments."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels import SegmentCache, local_attention, local_attention_step
from infini_train.attention.layer_memory import LayerMemory
from infini_train.attention.segment_cache import SegmentCached


class LocalAttention(SegmentCached):
    """Infini-attention without the memory: the context is one segment."""

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
        rotary = self.rotary(self.model.segment_length, q.device)
        return local_attention(q, k, v, segment_length=self.model.segment_length, rotary=rotary, lengths=lengths), None

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache) -> tuple[Tensor, SegmentCache]:
        rotary = self.rotary(self.model.segment_length, q.device)
        return local_attention_step(q, k, v, cache, segment_length=self.model.segment_length, rotary=rotary)
