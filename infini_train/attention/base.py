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
    """State of a layer between two calls of `step`."""

    memory: LayerMemory | None  # of the finished segments
    keys: Tensor  # [B, S, G, D]: the unfinished segment
    values: Tensor  # [B, S, G, D]
    length: int = 0  # number of its tokens

    @property
    def remaining(self) -> int:
        """Number of tokens until the segment ends: the longest chunk that the next step accepts."""
        return self.keys.shape[1] - self.length


class Attention(nn.Module):
    """Interface of an attention variant. The caller owns projections and normalisation."""

    memory_type: type[LayerMemory] | None = None
    """Type of the memory, a named tuple; None for a variant without memory."""

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.context_tokens = context_tokens
        self._rotary: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        """Return the fields of the memory of a layer (counted from 1), in the order of `memory_type`."""
        return {}

    def rotary(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [num_positions, D/2] float32.

        The tables are not buffers of the module, so that a cast of the module to bfloat16 leaves them in float32.
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
        """Compute the attention of one micro-batch.

        Args:
            q: [B, T, H, D], not rotated.
            k: [B, T, G, D], not rotated.
            v: [B, T, G, D].
            reset: [B, N] bool, True where a document begins in that segment.
            lengths: [B, N] valid tokens of each segment.
            group: processes that share the segments of a micro-batch in contiguous runs; None for one process.
            repeats: [B, N] number of times that each segment's memory update counts; None means once.
            memory: memory after the stream's previous micro-batch; None at the stream's start.

        Returns:
            [B, T, H, D] and the memory after the micro-batch.
        """
        raise NotImplementedError

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the cache of `step` at the start of a document."""
        shape = batch_size, self.model.segment_length, self.num_groups, self.model.head_dim
        return StreamCache(None, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Compute the next t tokens of a document. They must not cross the end of a segment.

        This default recomputes the unfinished segment.

        Args:
            q: [B, t, H, D]; k, v: [B, t, G, D].

        Returns:
            [B, t, H, D] and the cache for the following tokens.
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
            # The memory may share these tensors, so allocate new ones for the next segment.
            return out[:, start:end], StreamCache(memory, torch.zeros_like(cache.keys), torch.zeros_like(cache.values))
        return out[:, start:end], replace(cache, length=end)
