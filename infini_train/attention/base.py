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
    """What a layer keeps of a stream between two calls of `step`."""

    memory: LayerMemory | None  # of the finished segments
    keys: Tensor  # [B, S, G, D]: the unfinished segment
    values: Tensor  # [B, S, G, D]
    length: int = 0  # tokens of it that are held

    @property
    def remaining(self) -> int:
        """Tokens until the current segment ends: the longest chunk that the next step takes."""
        return self.keys.shape[1] - self.length


class Attention(nn.Module):
    """Scores and mixes values; projections and normalisation are its caller's."""

    memory_type: type[LayerMemory] | None = None
    """The named tuple that `forward` takes and returns; None for a variant that carries nothing."""

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.context_tokens = context_tokens
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        """Fields of the memory of a layer (counted from 1), in the order of `memory_type`; empty if it carries nothing."""
        return {}

    def rotary(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [num_positions, D/2] float32.

        Cached outside of the module's buffers: it is no state, and a cast of the module to bfloat16 must not touch it.
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

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """An empty cache for `step`, at the start of a document."""
        shape = batch_size, self.model.segment_length, self.num_groups, self.model.head_dim
        return StreamCache(None, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Streaming inference: the next t tokens of a document, none of which crosses the end of a segment.

        Unless a variant knows better, the unfinished segment is computed anew.

        Args:
            q: [B, t, H, D]; k, v: [B, t, G, D].

        Returns:
            [B, t, H, D] and the cache for the tokens after these.
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
            # The memory may hold these keys and values themselves, so the next segment gets others to write to.
            return out[:, start:end], StreamCache(memory, torch.zeros_like(cache.keys), torch.zeros_like(cache.values))
        return out[:, start:end], replace(cache, length=end)
