"""Disk usage of a run: the size of a checkpoint and the number of checkpoints that are kept."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from infini_train.config import LayoutConfig, RunConfig
from infini_train.planning.parameter_counts import total_parameters
from infini_train.planning.sizes import FLOAT32, Sizes

TENSORS_PER_PARAMETER = 3
"""Float32 tensors per parameter in a checkpoint: the master weight and Adam's two moments."""


def checkpoint_bytes(run: RunConfig) -> int:
    """Return the bytes of one checkpoint: parameters, and memory states of all rows and layers. The layout does not matter."""
    whole = Sizes(replace(run, layout=LayoutConfig()), 1)
    return TENSORS_PER_PARAMETER * FLOAT32 * total_parameters(run) + run.model.num_layers * whole.state_bytes


def kept_checkpoints(run: RunConfig) -> int:
    """Return the number of checkpoints on disk after the last step. While a checkpoint is written, one more can exist."""
    kept, steps = run.checkpoint, run.training.steps
    before = range(kept.every, steps, kept.every)
    newest = before[max(0, len(before) - kept.keep + 1) :]
    older = before[: len(before) - len(newest)]
    # Kept permanently: steps that are multiples of both `every` and `keep_every`.
    permanent = len(older) // (lcm(kept.every, kept.keep_every) // kept.every) if kept.keep_every else 0
    return permanent + len(newest) + 1
