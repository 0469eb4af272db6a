"""How often each segment's update of the memory counts in a training step: see `training.memory_ageing`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infini_train.config import TrainingConfig


def ageing_bound(training: TrainingConfig, step: int) -> float:
    """What counts stay below at a step, from 0: geometric from 1 to memory_ageing over a share of the steps."""
    rise = training.memory_ageing_rise * training.steps
    return training.memory_ageing ** min(1.0, step / rise if rise > 0 else 1.0)


def memory_repeats(training: TrainingConfig, step: int, draws: Tensor) -> Tensor:
    """Counts for the segments of a micro-batch.

    Args:
        step: optimizer steps done.
        draws: [B, N, 2] numbers in [0, 1): whether a segment is aged, and by how much.

    Returns:
        [B, N] int64, log-uniform between 1 and the bound, rounded down, for aged segments and 1 for the others.
    """
    count = torch.exp(draws[..., 1] * math.log(ageing_bound(training, step))).long().clamp(min=1)
    return torch.where(draws[..., 0] < training.memory_ageing_share, count, 1)
