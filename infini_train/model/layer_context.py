"""Input of the layers beside hidden states. Megatron-core passes it unchanged to the core attention of every layer."""

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
    """Return the memory at the start of streams, for the layers that carry one.

    Args:
        layers: global numbers, counted from 1.
        tensor_processes: number of processes that share a layer's heads.
    """
    memory = {}
    for layer in layers:
        # With `recurrent_memory` all layers see memory tokens, but only the first carries them.
        if (of_layer := memory_type(model, layer)) is not None and (fields := carried_fields(model, layer)):
            memory[layer] = of_layer(*(each.zeros(rows, tensor_processes, device) for each in fields.values()))
    return memory


@dataclass
class LayerContext(PackedSeqParams):
    """A micro-batch as the layers see it. It carries memory in and out; modules hold no memory.

    It subclasses Megatron-core's per-call attention parameters because `GPTModel` passes that argument
    to `core_attention`. `qkv_format` stays "sbhd", so that no layer in between interprets it.
    """

    qkv_format: str = "sbhd"
    reset: Tensor | None = None
    """[B, N] bool, True where a document begins in that segment."""
    memory_reset: Tensor | None = None
    """[B, N] bool, True where the memory is emptied, if this differs from the starts of documents."""
    lengths: Tensor | None = None
    """[B, N] valid tokens of each segment."""
    repeats: Tensor | None = None
    """[B, N] number of times that each segment's memory update counts; None means once."""
    memory_in: Memory = field(default_factory=dict)
    """Memory that enters, by layer; a missing layer starts empty."""
    memory_out: Memory = field(default_factory=dict)
    """Memory that leaves, by layer; written by the layers."""
    output_positions: slice | None = None
    """Positions whose logits the last chunk returns if there are no labels; None returns all."""
    caches: dict[int, Any] | None = None
    """Streaming caches by layer. When set, layers run `Attention.step` and leave the new cache here."""

    @property
    def empties_memory(self) -> Tensor | None:
        """Return the segments before which the memory is emptied, [B, N] bool."""
        return self.reset if self.memory_reset is None else self.memory_reset
