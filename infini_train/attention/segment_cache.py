"""Streaming with `infini_kernels.SegmentCache`, for the variants with a step of their own in infini_kernels."""

from __future__ import annotations

import torch

from infini_kernels import SegmentCache
from infini_train.attention.base import Attention


class SegmentCached(Attention):
    """An attention whose cache holds the keys and values of one unfinished segment."""

    @property
    def stream_segment_length(self) -> int:
        """Number of tokens after which the keys and values of a stream are dropped."""
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
