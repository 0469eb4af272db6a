"""Functions that the ranks run in the tests of `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infini_train.checkpoint.weights import load_initial_weights
from infini_train.config import RunConfig
from infini_train.evaluation.commands import load_model
from infini_train.measurement.generation import StreamingModel
from infini_train.parallel.deepspeed.optimizer_state import read_optimizer_state
from infini_train.resilience.stop_request import StopRequest
from infini_train.training.step import train_step
from infini_train.training.training_run import build_training_run
from tests.support.distributed import jobs


def logits(run: RunConfig, checkpoint: str, tokens: Tensor) -> Tensor:
    """Return the logits [B, T, V] of a model loaded from a checkpoint folder or a weights file."""
    module = load_model(run, Path(checkpoint)).engine.module
    return torch.cat(list(StreamingModel(module, run, batch_size=len(tokens)).feed(tokens)), dim=1)


def start(run: RunConfig, steps: int) -> dict[str, Any]:
    """Start from `training.initial_weights` and train.

    Returns:
        The printed line ("said"), the initial weights, and losses, gradient norms and weights after training.
    """
    training = build_training_run(run)
    said = load_initial_weights(run, training.engine, training.checkpointer.placements)
    initial = jobs.weights(training)
    records = [train_step(training, StopRequest())[0] for _ in range(steps)]
    return {
        "said": said,
        "initial": initial,
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "weights": jobs.weights(training),
    }


def parameter_shapes(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of every parameter of a model in one process."""
    return {each.name: each.global_shape for each in build_training_run(run).checkpointer.placements.values()}


def master_weights(run: RunConfig) -> dict[str, Tensor]:
    """Return global name -> initial float32 master weight, in one process."""
    training = build_training_run(run)
    load_initial_weights(run, training.engine, training.checkpointer.placements)
    placements = training.checkpointer.placements
    return {placements[name].name: value for name, value in read_optimizer_state(training.engine)["model"].items()}
