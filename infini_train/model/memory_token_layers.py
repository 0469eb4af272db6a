"""Baselines whose memory is tokens passed from segment to segment: the Recurrent Memory Transformer and TransformerFAM.

Shapes: T tokens, B rows, N segments, S segment length, P memory tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from infini_train.attention.rivals.memory_tokens import MemoryTokens
from infini_train.config import ModelConfig
from infini_train.model.layer_context import LayerContext
from infini_train.model.loss import ChunkedLossGPTModel


def by_segment(
    hidden: Tensor,
    initial: Tensor,
    context: LayerContext,
    layer_number: int,
    run_segment: Callable[[Tensor, Tensor, LayerContext], tuple[Tensor, Tensor]],
) -> Tensor:
    """Run a micro-batch segment by segment and pass the memory of each segment to the next.

    Args:
        hidden: [T, B, h].
        initial: [P, h], the memory at the start of a document.
        context: `memory_in` of this layer enters the first segment; the memory after the last goes to `memory_out`.
        run_segment: function from hidden states [S, B, h], memory [P, B, h] and the segment as a micro-batch to new hidden
            states and memory of the same shapes.

    Returns:
        Hidden states [T, B, h].
    """
    reset, lengths = context.empties_memory, context.lengths
    assert reset is not None and lengths is not None, "these variants do not stream token by token"
    rows, segments = reset.shape
    memory = begin = initial.unsqueeze(1).expand(-1, rows, -1)  # [P, B, h]
    if (entering := context.memory_in.get(layer_number)) is not None:
        # A row of zeros was emptied, possibly inside a document: see `training.health`.
        written = entering[0].ne(0).flatten(1).any(dim=1)
        memory = torch.where(written[:, None], entering[0].transpose(0, 1).to(hidden.dtype), begin)
    outputs = []
    for segment, tokens in enumerate(hidden.chunk(segments)):
        memory = torch.where(reset[:, segment].to(hidden.device)[None, :, None], begin, memory)
        # This micro-batch carries no memory: the memory of other layers stays in `micro_batch`, unchanged.
        inside = LayerContext(reset=reset[:, segment : segment + 1], lengths=lengths[:, segment : segment + 1])
        out, memory = run_segment(tokens, memory, inside)
        outputs.append(out)
    context.memory_out[layer_number] = MemoryTokens(memory.transpose(0, 1).float())
    return torch.cat(outputs)


class FeedbackLayer(TransformerLayer):
    """A layer of TransformerFAM. Its feedback tokens follow each segment through the layer and enter it again with the next."""

    def __init__(self, *args: Any, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_tokens = nn.Parameter(torch.empty(model.memory_tokens, model.hidden_size))

    def forward(self, hidden_states: Tensor, *, packed_seq_params: LayerContext, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output for hidden_states [T, B, h], and None for the context that Megatron-core's layers return."""

        def run(tokens: Tensor, memory: Tensor, segment: LayerContext) -> tuple[Tensor, Tensor]:
            extended = torch.cat([tokens, memory])
            out, _ = TransformerLayer.forward(self, extended, packed_seq_params=segment, **kwargs)
            return out[: len(tokens)], out[len(tokens) :]

        return by_segment(hidden_states, self.memory_tokens, packed_seq_params, self.layer_number, run), None


class RecurrentMemoryModel(ChunkedLossGPTModel):
    """The Recurrent Memory Transformer: the last layer's output at the write tokens is the next segment's memory."""

    def __init__(self, *args: Any, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_tokens = nn.Parameter(torch.empty(model.memory_tokens, model.hidden_size))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packed_seq_params: LayerContext,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Run the model like `GPTModel.forward`, but segment by segment."""

        def run(tokens: Tensor, memory: Tensor, segment: LayerContext) -> tuple[Tensor, Tensor]:
            extended = torch.cat([memory, tokens, memory])
            out = self.decoder(hidden_states=extended, attention_mask=None, packed_seq_params=segment)
            return out[len(memory) : -len(memory)], out[-len(memory) :]

        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        hidden = by_segment(hidden, self.memory_tokens, packed_seq_params, 1, run)
        return self._postprocess(
            hidden_states=hidden,
            labels=labels,
            packed_seq_params=packed_seq_params,
            runtime_gather_output=runtime_gather_output,
        )
