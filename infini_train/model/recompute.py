"""A transformer layer that keeps only its inputs for the backward: hidden states and the memory that enters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_train.model.layer_context import MicroBatch


class RecomputedLayer(TransformerLayer):
    """Computes its inside again in the backward.

    Memory is an explicit argument and result of what is checkpointed; were it taken from the micro-batch inside, its gradient
    would be lost without a word.
    """

    def forward(self, hidden_states: Tensor, *, packed_seq_params: MicroBatch, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states [T, B, h] -> the same shape, and None for the context that Megatron-core's layers return."""
        micro_batch, number = packed_seq_params, self.layer_number
        entering = micro_batch.memory_in.get(number)

        memory_type = self.self_attention.core_attention.memory_type

        def run(hidden: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            memory_in = {number: memory_type(*state)} if state else {}
            inside = replace(micro_batch, memory_in=memory_in, memory_out={})
            out, _ = TransformerLayer.forward(self, hidden, packed_seq_params=inside, **kwargs)
            leaving = inside.memory_out.get(number)
            return (out,) if leaving is None else (out, *leaving)

        if micro_batch.caches is not None:
            return super().forward(hidden_states, packed_seq_params=micro_batch, **kwargs)
        state = () if entering is None else tuple(entering)
        out, *leaving = checkpoint(run, hidden_states, *state, use_reentrant=False, preserve_rng_state=False)
        if leaving:
            micro_batch.memory_out[number] = memory_type(*leaving)
        return out, None
