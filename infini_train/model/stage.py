"""Layers of one pipeline device: one chunk of consecutive layers, or several chunks (virtual stages)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class StageModel(nn.Module):
    """The chunks of one device, in the order in which hidden states visit them.

    Args:
        chunks: each a run of consecutive layers. The first of the first device embeds tokens, the last of the last device has
            the output layer.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def chunk(self, number: int) -> GPTModel:
        """Return a chunk, counted from 0."""
        model = self.chunks[number]
        assert isinstance(model, GPTModel)
        return model

    def forward(self, *args: Any, chunk: int = 0, hidden: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compute the output of one chunk.

        Args:
            hidden: [T, B, h] from the chunk before; None for the first, which embeds tokens.
        """
        model = self.chunk(chunk)
        if hidden is not None:
            model.set_input_tensor(hidden)
        return model(*args, **kwargs)

    def layers(self, chunk: int | None = None) -> Iterator[TransformerLayer]:
        """Return the layers of one chunk, or of all."""
        for number in range(len(self.chunks)) if chunk is None else [chunk]:
            yield from self.chunk(number).decoder.layers
