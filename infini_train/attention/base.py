"""The interface of an attention variant.

Shapes: B rows, T tokens, N segments, S segment length, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.attention.rotary_frequencies import rotary_frequencies
from infini_train.config import ModelConfig


@dataclass(frozen=True)
class StreamCache:
    """State of one layer between two calls of `step`."""

    memory: LayerMemory | None  # after the finished segments
    keys: Tensor  # [B, S, G, D]: the unfinished segment
    values: Tensor  # [B, S, G, D]
    length: int = 0  # tokens held in the unfinished segment

    @property
    def remaining(self) -> int:
        """Tokens until the current segment ends: the longest chunk that the next step accepts."""
        return self.keys.shape[1] - self.length


class Attention(nn.Module):
    """Base class of the attention variants. The caller does projections and normalisation."""

    memory_type: type[LayerMemory] | None = None
    """The named tuple type that `forward` takes and returns; None for a variant that carries nothing."""

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.context_tokens = context_tokens
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        """Return the memory fields of a layer (counted from 1) in the order of `memory_type`; empty if it carries nothing."""
        return {}

    def rotary(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [num_positions, D/2] float32.

        The tables are cached outside the module's buffers: they are not state, and a cast of the module to bfloat16 must not
        change them.
        """
        key = (num_positions, device)
        if key not in self._rotary:
            angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * rotary_frequencies(self.model)
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
        """Compute attention for one micro-batch.

        Args:
            q: [B, T, H, D], not rotated.
            k: [B, T, G, D], not rotated.
            v: [B, T, G, D].
            reset: [B, N] bool, True where a document begins in that segment.
            lengths: [B, N] number of valid tokens in each segment.
            group: context-parallel group; each rank holds a contiguous run of the segments. None if this rank holds them all.
            repeats: [B, N] number of times that each segment's memory update is applied; None means once.
            memory: the memory returned for the stream's previous micro-batch; None at the stream's start.

        Returns:
            The output [B, T, H, D] and the memory after the last segment.
        """
        raise NotImplementedError

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Create an empty cache for `step`, as at the start of a document."""
        shape = batch_size, self.model.segment_length, self.num_groups, self.model.head_dim
        return StreamCache(None, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run streaming inference on the next t tokens of a document. The chunk must not cross the end of a segment.

        This default recomputes the whole unfinished segment at each step; a variant may override it with a faster one.

        Args:
            q: [B, t, H, D]; k, v: [B, t, G, D].

        Returns:
            The output [B, t, H, D] and the cache for the next tokens.
        """
        assert isinstance(cache, StreamCache)
        start, end, device = cache.length, cache.length + q.shape[1], q.device
        cache.keys[:, start:end], cache.values[:, start:end] = k, v
        queries = q.new_zeros(len(q), self.model.segment_length, *q.shape[2:])
        queries[:, start:end] = q
        out, memory = self(
            queries,
            cache.keys,
            cache.values,
            reset=torch.zeros(len(q), 1, dtype=torch.bool, device=device),
            lengths=torch.full((len(q), 1), end, device=device),
            memory=cache.memory,
        )
        if end == self.model.segment_length:
            # The memory may alias these key and value buffers, so the next segment gets new ones.
            return out[:, start:end], StreamCache(memory, torch.zeros_like(cache.keys), torch.zeros_like(cache.values))
        return out[:, start:end], replace(cache, length=end)
