"""The layers of one pipeline stage: one chunk of consecutive layers, or several separate chunks (virtual stages)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class StageModel(nn.Module):
    """The chunks of one pipeline stage, in the order in which hidden states pass them.

    Args:
        chunks: runs of consecutive layers. The first chunk of the first stage embeds tokens; the last chunk of the last stage
            has the output layer.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def chunk(self, number: int) -> GPTModel:
        """Return a chunk by its index, from 0."""
        model = self.chunks[number]
        assert isinstance(model, GPTModel)
        return model

    def forward(self, *args: Any, chunk: int = 0, hidden: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run one chunk and return its output.

        Args:
            chunk: index of the chunk, from 0.
            hidden: [T, B, h] from the previous chunk; None for the model's first chunk, which embeds tokens.
        """
        model = self.chunk(chunk)
        if hidden is not None:
            model.set_input_tensor(hidden)
        return model(*args, **kwargs)

    def layers(self, chunk: int | None = None) -> Iterator[TransformerLayer]:
        """Iterate over the layers of one chunk, or of all chunks if `chunk` is None."""
        for number in range(len(self.chunks)) if chunk is None else [chunk]:
            yield from self.chunk(number).decoder.layers
