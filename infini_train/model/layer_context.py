"""Inputs of the layers besides hidden states. Megatron-core passes this object unchanged to every layer's core attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from infini_train.attention import LayerMemory, carried_fields, memory_type
from infini_train.config import ModelConfig

Memory = dict[int, LayerMemory]
"""Memory by global layer number, counted from 1."""


def empty_memory(
    model: ModelConfig, layers: Iterable[int], rows: int, tensor_processes: int, device: torch.device | str | None
) -> Memory:
    """Create the memory at the start of streams, for those of the given layers that carry one.

    Args:
        layers: global layer numbers, counted from 1.
        rows: number of rows of this rank.
        tensor_processes: number of ranks that share a layer's heads.
        device: device of the tensors; None for the default device.
    """
    memory = {}
    for layer in layers:
        # With `recurrent_memory` all layers process memory tokens, but only the first carries them.
        if (of_layer := memory_type(model, layer)) is not None and (fields := carried_fields(model, layer)):
            memory[layer] = of_layer(*(each.zeros(rows, tensor_processes, device) for each in fields.values()))
    return memory


@dataclass
class LayerContext(PackedSeqParams):
    """A micro-batch as the layers receive it. Memory enters and leaves through it, never as hidden module state.

    It subclasses Megatron-core's per-call attention parameters because `GPTModel` passes that argument through to
    `core_attention`. `qkv_format` stays "sbhd", so that no code in between interprets it.
    """

    qkv_format: str = "sbhd"
    reset: Tensor | None = None
    """[B, N] bool, True where a document begins in that segment."""
    memory_reset: Tensor | None = None
    """[B, N] bool, True where the memory is emptied before that segment; None means where documents begin."""
    lengths: Tensor | None = None
    """[B, N] number of valid tokens in each segment."""
    repeats: Tensor | None = None
    """[B, N] number of times that each segment's memory update is applied; None means once."""
    memory_in: Memory = field(default_factory=dict)
    """Memory before the first segment, by layer; a missing layer starts empty."""
    memory_out: Memory = field(default_factory=dict)
    """Memory after the last segment, by layer; the layers write it."""
    output_positions: slice | None = None
    """Positions for which the last chunk returns logits if no labels are given; None means all."""
    caches: dict[int, Any] | None = None
    """Streaming caches by layer. If set, layers run `Attention.step` and store the new cache here."""

    @property
    def empties_memory(self) -> Tensor | None:
        """[B, N] bool, True where the memory is emptied before that segment."""
        return self.reset if self.memory_reset is None else self.memory_reset
