"""The adapter between Megatron-core's attention layer and an attention variant.

Shapes: T tokens, B rows, H query heads and G key/value heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from infini_train.attention import build_attention, memory_type
from infini_train.attention.short_convolution import ConvolutionTail, MemoryWithTail, ShortConvolution
from infini_train.config import RunConfig
from infini_train.model.layer_context import LayerContext


@dataclass(frozen=True)
class LayerCache:
    """State of one layer between two chunks of a stream."""

    attention: Any  # the cache that `Attention.step` returned
    tail: ConvolutionTail | None  # None without a convolution
    remaining: int  # tokens in the longest chunk that the next step accepts


class CoreAttention(MegatronModule):
    """Megatron-core's `core_attention`, implemented by an attention variant.

    The model is built with `position_embedding_type="none"`, so queries and keys arrive unrotated, as the memory requires.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, run: RunConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        tp = config.tensor_model_parallel_size
        self.attention = build_attention(
            run.model,
            layer_number,
            num_heads=run.model.num_attention_heads // tp,
            num_groups=run.model.num_query_groups // tp,
            context_tokens=run.micro_batch_tokens,
        )
        self.short_convolution = ShortConvolution(run.model, self.attention.num_groups) if run.model.short_convolution else None
        self.memory_type = memory_type(run.model, layer_number)

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Create the cache at a document's start."""
        tail = None
        if self.short_convolution is not None:
            tail = self.short_convolution.empty_tail(batch_size, self.attention.num_heads, dtype, device)
        return self._cache(self.attention.new_cache(batch_size, dtype, device), tail)

    def _cache(self, attention: Any, tail: ConvolutionTail | None) -> LayerCache:
        remaining = attention.remaining
        if tail is not None:  # the cache of `full` spans more than one segment, the convolution does not
            remaining = min(remaining, self.attention.model.segment_length - tail.length)
        return LayerCache(attention, tail, remaining)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        tail = cache.tail
        if self.short_convolution is not None:
            assert tail is not None
            q, k, tail = self.short_convolution.step(q, k, tail)
        out, attention = self.attention.step(q, k, v, cache.attention)
        return out, self._cache(attention, tail)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: LayerContext,
        **_: Any,
    ) -> Tensor:
        """Compute attention: query [T, B, H, D], key and value [T, B, G, D] -> [T, B, H × D].

        Memory and streaming caches are read from and written to `packed_seq_params`.
        """
        context = packed_seq_params
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        if context.caches is not None:
            out, context.caches[self.layer_number] = self._step(q, k, v, context.caches[self.layer_number])
        else:
            reset = context.empties_memory
            assert context.reset is not None and reset is not None and context.lengths is not None
            entering = context.memory_in.get(self.layer_number)
            tail = None
            if isinstance(entering, MemoryWithTail):
                tail, entering = entering.tail, entering.memory
            if self.short_convolution is not None:
                q, k, tail = self.short_convolution(q, k, context.reset, tail, context.cp_group)
            out, memory = self.attention(
                q,
                k,
                v,
                reset=reset,
                lengths=context.lengths,
                memory=entering,
                group=context.cp_group,
                repeats=context.repeats,
            )
            if memory is not None:
                context.memory_out[self.layer_number] = memory if tail is None else MemoryWithTail.joined(memory, tail)
        return out.transpose(0, 1).flatten(2)
