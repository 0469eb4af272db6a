"""What the ranks of the planning tests run: the real engine and pipeline, with their tensors counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infini_train.config import RunConfig
from infini_train.planning.engine_tensors import gradient_tensors, optimizer_tensors, weight_tensors
from infini_train.planning.observe import Message, Observer, tensor_bytes
from infini_train.training.setup import Parts, build_parts
from infini_train.training.signals import StopRequest
from infini_train.training.step import train_step


class KeptTensors:
    """What live micro-batches keep: storages that autograd saves, and memory states apart from them."""

    def __init__(self, parts: Parts) -> None:
        self.module = parts.engine.module
        self.activations: dict[tuple[int, int], dict[int, int]] = {}
        self.states: dict[tuple[int, int], list[Tensor]] = {}
        self.most_activations = self.most_states = self.most_live = 0
        pipeline = parts.pipeline
        forward, backward = pipeline._forward, pipeline._backward
        recompute = parts.run.training.recompute == "stage"

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
            key = (id(batch), min(leaving))
            self.activations[key] = saved
            self.states[key] = states
            self._note()
            return output, leaving, loss

        def counted_backward(live: Any, *arguments: Any) -> Any:
            entered = backward(live, *arguments)
            key = (id(live.batch), min(live.memory_out))
            gradients = [part for states in (arguments[-1], entered) for state in states.values() for part in state]
            self._note(gradients)
            del self.activations[key], self.states[key]
            return entered

        pipeline._forward, pipeline._backward = counted_forward, counted_backward  # type: ignore[method-assign]

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


def measured_step(run: RunConfig) -> dict[str, Any]:
    """Bytes of each part of the memory in the second training step, and the messages of this rank."""
    parts = build_parts(run)
    train_step(parts, StopRequest())
    kept = KeptTensors(parts)
    weights, optimizer = [*weight_tensors(parts.engine)], [*optimizer_tensors(parts.engine)]
    states = [part for state in parts.state.memory.values() for part in state]
    observer = Observer([*weights, *optimizer, *gradient_tensors(parts.engine), *states])
    at_step: dict[str, int] = {}
    step = parts.engine.step

    def counted_step(number: int) -> float:
        # Up to here, because AdamW on a CPU has temporaries of its own that the fused one on a GPU has not.
        at_step.update(gradients=tensor_bytes(gradient_tensors(parts.engine)), peak=observer.peak)
        return step(number)

    parts.engine.step = counted_step  # type: ignore[method-assign]
    with observer:
        train_step(parts, StopRequest())
    messages: list[Message] = observer.messages
    return {
        "stage": parts.layout.pp_rank,
        "parameters": {
            parts.checkpointer.placements[name].name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in parts.engine.module.named_parameters()
        },
        "weights": tensor_bytes(weights),
        "optimizer": tensor_bytes(optimizer),
        "activations": kept.most_activations,
        "in_flight": kept.most_live,
        "memory_states": kept.most_states,
        **at_step,
        "messages": messages,
    }
