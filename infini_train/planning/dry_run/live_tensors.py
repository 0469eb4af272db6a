"""Watches what micro-batches keep between their forward and their backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.planning.dry_run.recorded_operations import tensor_bytes


class KeptTensors:
    """What live micro-batches keep: storages that autograd saves, and memory states apart from them.

    Args:
        pipeline: watched from now on.

    Attributes:
        most_activations: the most bytes that were kept at one time.
        most_states: the most bytes of memory states, with their gradients.
        most_live: the most micro-batches (and chunks) between forward and backward.
    """

    def __init__(self, pipeline: SegmentPipeline) -> None:
        self.module = pipeline.engine.module
        # By the identity of the memory that enters, which the pipeline keeps as long as the micro-batch.
        self.activations: dict[int, dict[int, int]] = {}
        self.states: dict[int, list[Tensor]] = {}
        self.most_activations = self.most_states = self.most_live = 0
        forward, backward = pipeline._forward, pipeline._backward
        recompute = pipeline.run.training.recompute == "stage"

        def counted_forward(batch: Any, chunk: int, hidden: Tensor | None, memory: Any, **kwargs: Any) -> Any:
            if recompute and torch.is_grad_enabled():  # inside a backward, which lets go of it again
                return forward(batch, chunk, hidden, memory, **kwargs)
            saved: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            if hidden is not None:
                keep(hidden)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output, leaving, loss = forward(batch, chunk, hidden, memory, **kwargs)
            if not recompute and chunk != pipeline.last_chunk:
                keep(output)
            states = [part for state in (*memory.values(), *leaving.values()) for part in state]
            for storage in self._not_activations(states):
                saved.pop(storage, None)
            self.activations[id(memory)], self.states[id(memory)] = saved, states
            self._note()
            return output, leaving, loss

        def counted_backward(live: Any, *arguments: Any) -> Any:
            entered = backward(live, *arguments)
            gradients = [part for states in (arguments[-1], entered) for state in states.values() for part in state]
            self._note(gradients)
            del self.activations[id(live.memory_in)], self.states[id(live.memory_in)]
            return entered

        pipeline._forward, pipeline._backward = counted_forward, counted_backward  # type: ignore[assignment,method-assign]

    def _not_activations(self, states: list[Tensor]) -> set[int]:
        tensors = [*states, *self.module.parameters()]
        for layer in self.module.layers():
            tensors += [table for pair in layer.self_attention.core_attention.attention._rotary.values() for table in pair]
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def _note(self, gradients: Sequence[Tensor] = ()) -> None:
        union: dict[int, int] = {}
        for saved in self.activations.values():
            union |= saved
        self.most_activations = max(self.most_activations, sum(union.values()))
        self.most_live = max(self.most_live, len(self.activations))
        states = [part for states in self.states.values() for part in states]
        self.most_states = max(self.most_states, tensor_bytes([*states, *gradients]))
