"""Repeat counts of the segments' memory updates in a training step: see `training.memory_ageing`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infini_train.config import TrainingConfig


def ageing_bound(training: TrainingConfig, step: int) -> float:
    """Return the upper bound of the counts at a step (from 0).

    It grows geometrically from 1 to memory_ageing over the first memory_ageing_rise share of the steps, then stays.
    """
    rise = training.memory_ageing_rise * training.steps
    return training.memory_ageing ** min(1.0, step / rise if rise > 0 else 1.0)


def memory_repeats(training: TrainingConfig, step: int, draws: Tensor) -> Tensor:
    """Return how often each segment's memory update counts in a micro-batch.

    Args:
        step: number of finished optimizer steps.
        draws: [B, N, 2] uniform random numbers in [0, 1): the first decides whether a segment is aged, the second its count.

    Returns:
        [B, N] int64. Counts of aged segments are log-uniform between 1 and `ageing_bound`, rounded down; the others are 1.
    """
    count = torch.exp(draws[..., 1] * math.log(ageing_bound(training, step))).long().clamp(min=1)
    return torch.where(draws[..., 0] < training.memory_ageing_share, count, 1)
