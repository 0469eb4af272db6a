"""Baseline: full causal attention within each document of a micro-batch.

Its context is one micro-batch: to compare it with Infini-attention on N segments, set segments_per_micro_batch to N.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels import SegmentCache, document_attention, local_attention_step
from infini_train.attention.layer_memory import LayerMemory
from infini_train.attention.segment_cache import SegmentCached


class FullAttention(SegmentCached):
    """Causal attention over a micro-batch that does not cross document boundaries; its cost is quadratic in the length."""

    @property
    def stream_segment_length(self) -> int:
        return self.context_tokens

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
        rotary = self.rotary(q.shape[1], q.device)
        out = document_attention(q, k, v, segment_length=self.model.segment_length, reset=reset, lengths=lengths, rotary=rotary)
        return out, None

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache) -> tuple[Tensor, SegmentCache]:
        rotary = self.rotary(self.stream_segment_length, q.device)
        return local_attention_step(q, k, v, cache, segment_length=self.stream_segment_length, rotary=rotary)
