"""Measurement of the tensors that micro-batches keep between forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.planning.dry_run.recorded_operations import tensor_bytes


class KeptTensors:
    """Tensors that the micro-batches in flight keep: storages saved by autograd, and memory states counted separately.

    Args:
        pipeline: pipeline to observe. Its forward and backward functions are wrapped.

    Attributes:
        max_activation_bytes: the largest number of activation bytes kept at the same time.
        max_state_bytes: the largest number of bytes of memory states and their gradients.
        max_in_flight: the largest number of micro-batches between forward and backward, counted once per chunk.
    """

    def __init__(self, pipeline: SegmentPipeline) -> None:
        self.module = pipeline.engine.module
        # Keyed by the id of the entering memory, which the pipeline keeps alive as long as the micro-batch.
        self.activations: dict[int, dict[int, int]] = {}
        self.states: dict[int, list[Tensor]] = {}
        self.max_activation_bytes = self.max_state_bytes = self.max_in_flight = 0
        forward, backward = pipeline._forward, pipeline._backward
        recompute = pipeline.run.training.recompute == "stage"

        def observed_forward(batch: Any, chunk: int, hidden: Tensor | None, memory: Any, **kwargs: Any) -> Any:
            if recompute and torch.is_grad_enabled():  # recomputation inside a backward pass, which frees its tensors again
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
            states = [tensor for state in (*memory.values(), *leaving.values()) for tensor in state]
            for storage in self._non_activation_storages(states):
                saved.pop(storage, None)
            self.activations[id(memory)], self.states[id(memory)] = saved, states
            self._update_maxima()
            return output, leaving, loss

        def observed_backward(live: Any, *arguments: Any) -> Any:
            entered = backward(live, *arguments)
            gradients = [tensor for states in (arguments[-1], entered) for state in states.values() for tensor in state]
            self._update_maxima(gradients)
            del self.activations[id(live.memory_in)], self.states[id(live.memory_in)]
            return entered

        pipeline._forward, pipeline._backward = observed_forward, observed_backward  # type: ignore[assignment,method-assign]

    def _non_activation_storages(self, states: list[Tensor]) -> set[int]:
        tensors = [*states, *self.module.parameters()]
        for layer in self.module.layers():
            tensors += [table for pair in layer.self_attention.core_attention.attention._rotary.values() for table in pair]
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def _update_maxima(self, gradients: Sequence[Tensor] = ()) -> None:
        union: dict[int, int] = {}
        for saved in self.activations.values():
            union |= saved
        self.max_activation_bytes = max(self.max_activation_bytes, sum(union.values()))
        self.max_in_flight = max(self.max_in_flight, len(self.activations))
        states = [tensor for states in self.states.values() for tensor in states]
        self.max_state_bytes = max(self.max_state_bytes, tensor_bytes([*states, *gradients]))
