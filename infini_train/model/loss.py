"""Vocabulary-parallel cross entropy over sequence chunks, so that the logits of a whole micro-batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_kernels.timing import timed_as
from infini_train.model.layer_context import LayerContext

TokenLosses: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class ChunkedLossGPTModel(GPTModel):
    """Megatron-core's GPT with the output layer and the loss computed together, chunk by chunk.

    Args:
        loss_chunk_tokens: number of positions of a row whose logits exist at one time, in the forward and in the backward.
        token_losses: function from logits [T, B, V] and targets [B, T] to losses [B, T] for a vocabulary that is not split;
            None for Megatron-core's loss.
    """

    def __init__(self, *args: Any, loss_chunk_tokens: int, token_losses: TokenLosses | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_chunk_tokens, self.token_losses = loss_chunk_tokens, token_losses
        if self.post_process:
            # The loss chunks cut the whole sequence, so sequence-parallel shards are gathered in `_postprocess` first.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.output_layer.allreduce_dgrad or self.config.sequence_parallel

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None,
        runtime_gather_output: bool | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Compute this stage's result from hidden_states [T, B, h].

        Returns:
            Before the last stage: hidden_states. With labels [B, T]: the loss per token [B, T]. Otherwise: logits
            [B, T, V / tp], only for the micro-batch's `output_positions` if they are set.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The output layer sums gradients over the tensor-parallel group, so this gather's backward only takes a slice.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is None:
            if isinstance(packed_seq_params, LayerContext) and packed_seq_params.output_positions is not None:
                hidden_states = hidden_states[packed_seq_params.output_positions]
            logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
            return logits.transpose(0, 1).contiguous()

        @timed_as("output layer and loss")
        def losses(hidden: Tensor, targets: Tensor) -> Tensor:
            logits, _ = self.output_layer(hidden, weight=weight)
            if self.token_losses is not None:
                return self.token_losses(logits, targets)
            return self.compute_language_model_loss(targets, logits)  # [B, chunk]

        if hidden_states.shape[0] <= self.loss_chunk_tokens:
            return losses(hidden_states, labels)
        chunks = zip(hidden_states.split(self.loss_chunk_tokens), labels.split(self.loss_chunk_tokens, dim=1), strict=True)
        return torch.cat([checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks], dim=1)
