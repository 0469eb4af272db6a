"""A transformer layer that saves only its inputs for the backward: hidden states and the incoming memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_train.model.layer_context import LayerContext


class RecomputedLayer(TransformerLayer):
    """Transformer layer that recomputes its activations in the backward.

    Memory is an explicit argument and result of the checkpointed function. If the function read it from the micro-batch,
    its gradient would be lost silently.
    """

    def forward(self, hidden_states: Tensor, *, packed_seq_params: LayerContext, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output for hidden_states [T, B, h], and None for the context that Megatron-core's layers return."""
        context, number = packed_seq_params, self.layer_number
        entering = context.memory_in.get(number)

        memory_type = self.self_attention.core_attention.memory_type

        def run(hidden: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            memory_in = {number: memory_type(*state)} if state else {}
            inside = replace(context, memory_in=memory_in, memory_out={})
            out, _ = TransformerLayer.forward(self, hidden, packed_seq_params=inside, **kwargs)
            leaving = inside.memory_out.get(number)
            return (out,) if leaving is None else (out, *leaving)

        if context.caches is not None:
            return super().forward(hidden_states, packed_seq_params=context, **kwargs)
        state = () if entering is None else tuple(entering)
        out, *leaving = checkpoint(run, hidden_states, *state, use_reentrant=False, preserve_rng_state=False)
        if leaving:
            context.memory_out[number] = memory_type(*leaving)
        return out, None
