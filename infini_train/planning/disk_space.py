"""What a run leaves on the disk: the size of a checkpoint, and how many stay."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from infini_train.config import LayoutConfig, RunConfig
from infini_train.planning.parameter_counts import total_parameters
from infini_train.planning.sizes import FLOAT32, Sizes

KINDS = 3
"""Tensors of a parameter in a checkpoint, all float32: the master weight and Adam's two moments."""


def checkpoint_bytes(run: RunConfig) -> int:
    """Bytes of one checkpoint: parameters, and the memory of every row in every layer. The same in all layouts."""
    whole = Sizes(replace(run, layout=LayoutConfig()), 1)
    return KINDS * FLOAT32 * total_parameters(run) + run.model.num_layers * whole.state_bytes


def kept_checkpoints(run: RunConfig) -> int:
    """Checkpoints that are there when the last step is done; while one is written, there can be one more."""
    kept, steps = run.checkpoint, run.training.steps
    before = range(kept.every, steps, kept.every)
    newest = before[max(0, len(before) - kept.keep + 1) :]
    older = before[: len(before) - len(newest)]
    # Steps that both `every` and `keep_every` divide.
    for_good = len(older) // (lcm(kept.every, kept.keep_every) // kept.every) if kept.keep_every else 0
    return for_good + len(newest) + 1
