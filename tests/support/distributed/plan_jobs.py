"""Functions that the ranks run in the planning tests: the real engine and pipeline, with observed tensors."""

from __future__ import annotations

from typing import Any

from infini_train.config import RunConfig
from infini_train.data.streams import Batch
from infini_train.planning.dry_run.engine_tensors import gradient_tensors, optimizer_tensors, weight_tensors
from infini_train.planning.dry_run.live_tensors import KeptTensors
from infini_train.planning.dry_run.recorded_operations import Message, Observer, tensor_bytes
from infini_train.resilience.stop_request import StopRequest
from infini_train.training.step import train_step
from infini_train.training.training_run import TrainingRun, build_training_run


def measured_step(run: RunConfig) -> dict[str, Any]:
    """Return the bytes of each memory category in the second training step, and the messages of this rank."""
    training = build_training_run(run)
    train_step(training, StopRequest())
    _without_padding(training)
    kept = KeptTensors(training.pipeline)
    weights, optimizer = [*weight_tensors(training.engine)], [*optimizer_tensors(training.engine)]
    states = [tensor for state in training.state.memory.values() for tensor in state]
    observer = Observer([*weights, *optimizer, *gradient_tensors(training.engine), *states])
    at_step: dict[str, int] = {}
    step = training.engine.step

    def observed_step(number: int) -> float:
        # Measure before the step, because AdamW on a CPU has temporary tensors that fused AdamW on a GPU does not have.
        at_step.update(gradients=tensor_bytes(gradient_tensors(training.engine)), peak=observer.peak)
        return step(number)

    training.engine.step = observed_step  # type: ignore[method-assign]
    with observer:
        train_step(training, StopRequest())
    messages: list[Message] = observer.messages
    return {
        "stage": training.layout.pp_rank,
        "parameters": {
            training.checkpointer.placements[name].name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in training.engine.module.named_parameters()
        },
        "weights": tensor_bytes(weights),
        "optimizer": tensor_bytes(optimizer),
        "activations": kept.max_activation_bytes,
        "in_flight": kept.max_in_flight,
        "memory_states": kept.max_state_bytes,
        **at_step,
        "messages": messages,
    }


def _without_padding(training: TrainingRun) -> None:
    """Treat padding in the last segment of a document as tokens, because most segments of a long document have no padding."""
    read = training.state.reader.next

    def full(num_segments: int) -> Batch | None:
        batch = read(num_segments)
        assert batch is not None
        batch.lengths[:] = training.run.model.segment_length
        return batch

    training.state.reader.next = full  # type: ignore[method-assign]
