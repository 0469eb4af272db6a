"""Streaming with the caches of `infini_kernels`, for the variants that have a streaming step there."""

from __future__ import annotations

import torch

from infini_kernels import SegmentCache
from infini_train.attention.base import Attention


class SegmentCached(Attention):
    """Base class of variants that cache keys and values of one unfinished segment."""

    @property
    def stream_segment_length(self) -> int:
        """Number of tokens after which a stream's cached keys and values are dropped."""
        return self.model.segment_length

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> SegmentCache:
        return SegmentCache.empty(
            batch_size,
            self.stream_segment_length,
            self.num_groups,
            self.model.head_dim,
            self.model.head_dim,
            with_memory=self.memory_type is not None,
            normaliser=self.model.normaliser,
            device=device,
            dtype=dtype,
        )
