"""What travels beside the hidden states: Megatron-core hands this object unchanged to every layer's core attention."""

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
    """The memory with which streams begin, of those of the layers that carry one.

    Args:
        layers: global numbers, counted from 1.
        tensor_processes: that share a layer's heads.
    """
    memory = {}
    for layer in layers:
        # With `recurrent_memory` all layers see memory tokens, and the first carries them.
        if (of_layer := memory_type(model, layer)) is not None and (fields := carried_fields(model, layer)):
            memory[layer] = of_layer(*(each.zeros(rows, tensor_processes, device) for each in fields.values()))
    return memory


@dataclass
class LayerContext(PackedSeqParams):
    """A micro-batch as the layers see it. Memory goes in and comes out here, never as hidden module state.

    It subclasses Megatron-core's per-call attention parameters because that is the argument which `GPTModel` passes through
    to `core_attention`; `qkv_format` stays "sbhd", so nothing in between interprets it.
    """

    qkv_format: str = "sbhd"
    reset: Tensor | None = None
    """[B, N] bool, True where a document begins in that segment."""
    memory_reset: Tensor | None = None
    """[B, N] bool, True where the memory is emptied, if that is not where documents begin."""
    lengths: Tensor | None = None
    """[B, N] valid tokens of each segment."""
    repeats: Tensor | None = None
    """[B, N] how often each segment's update of the memory counts; None is once."""
    memory_in: Memory = field(default_factory=dict)
    """Memory that enters, by layer; a missing layer starts empty."""
    memory_out: Memory = field(default_factory=dict)
    """Memory that leaves, by layer; written by the layers."""
    output_positions: slice | None = None
    """Positions whose logits the last chunk gives where there are no labels; None gives all."""
    caches: dict[int, Any] | None = None
    """Streaming caches by layer. When set, layers run `Attention.step` and leave the new cache here."""

    @property
    def empties_memory(self) -> Tensor | None:
        """[B, N] bool, the segments before which the memory is emptied."""
        return self.reset if self.memory_reset is None else self.memory_reset
