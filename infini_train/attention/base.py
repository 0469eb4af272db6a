"""The interface of an attention variant.

Shapes: B rows, T tokens, N segments, S segment length, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from infini_kernels import MemoryState, SegmentCache
from infini_train.config import ModelConfig

LayerMemory = MemoryState
"""What one layer carries from micro-batch to micro-batch."""


class Attention(nn.Module):
    """Scores and mixes values; projections and normalisation are its caller's.

    A variant says with `uses_memory` whether `forward` takes and returns a memory.
    """

    uses_memory = False

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.context_tokens = context_tokens
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def rotary(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [num_positions, D/2] float32.

        Cached outside of the module's buffers: it is no state, and a cast of the module to bfloat16 must not touch it.
        """
        key = (num_positions, device)
        if key not in self._rotary:
            half = self.model.head_dim // 2
            exponent = torch.arange(half, dtype=torch.float64) / half
            angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * self.model.rotary_base**-exponent
            self._rotary[key] = (angle.cos().float().to(device), angle.sin().float().to(device))
        return self._rotary[key]

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
        """One micro-batch.

        Args:
            q: [B, T, H, D], not rotated.
            k: [B, T, G, D], not rotated.
            v: [B, T, G, D].
            reset: [B, N] bool, True where a document begins in that segment.
            lengths: [B, N] valid tokens of each segment.
            group: processes over which the segments of a micro-batch are spread in contiguous runs; None if this one has all.
            repeats: [B, N] how often each segment's update of the memory counts; None is once.
            memory: what the layer returned for the stream's previous micro-batch; None at the stream's start.

        Returns:
            [B, T, H, D] and the memory that leaves.
        """
        raise NotImplementedError

    @property
    def stream_segment_length(self) -> int:
        """Tokens after which a stream's keys and values are let go."""
        return self.model.segment_length

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> SegmentCache:
        """An empty cache for `step`, at the start of a document."""
        return SegmentCache.empty(
            batch_size,
            self.stream_segment_length,
            self.num_groups,
            self.model.head_dim,
            self.model.head_dim,
            with_memory=self.uses_memory,
            device=device,
            dtype=dtype,
        )

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache) -> tuple[Tensor, SegmentCache]:
        """Streaming inference: the next t tokens of a document, none of which crosses the end of a segment.

        Args:
            q: [B, t, H, D]; k, v: [B, t, G, D].

        Returns:
            [B, t, H, D] and the cache for the tokens after these.
        """
        raise NotImplementedError
