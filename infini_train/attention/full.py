"""Full causal attention over a whole micro-batch, inside each document.

Its context is the micro-batch: to compare with Infini-attention on N segments, give it segments_per_micro_batch = N.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels import SegmentCache, document_attention, local_attention_step
from infini_train.attention.layer_memory import LayerMemory
from infini_train.attention.segment_cache import SegmentCached


class FullAttention(SegmentCached):
    """Causal attention over the micro-batch. Its cost is quadratic in the length; documents do not see each other."""

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
