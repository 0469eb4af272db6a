"""Repeat counts of aged segments in a training step."""

from __future__ import annotations

import pytest
import torch

from infini_train.config import TrainingConfig
from infini_train.model.memory_ageing import ageing_bound, memory_repeats


def test_bound_rises_then_stays():
    training = TrainingConfig(steps=100, memory_ageing=4000, memory_ageing_rise=0.6)
    assert ageing_bound(training, 0) == 1
    assert ageing_bound(training, 30) == pytest.approx(4000**0.5)
    assert ageing_bound(training, 60) == ageing_bound(training, 99) == 4000
    assert ageing_bound(TrainingConfig(steps=100, memory_ageing=8, memory_ageing_rise=0.0), 0) == 8


def test_aged_share_has_log_uniform_counts():
    training = TrainingConfig(steps=100, memory_ageing=4000, memory_ageing_share=0.5)
    draws = torch.rand(100, 200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    repeats = memory_repeats(training, 99, draws)
    assert repeats.dtype == torch.int64 and repeats.min() == 1 and 3500 < repeats.max() <= 4000
    aged = repeats[draws[..., 0] < 0.5]
    assert abs(aged.numel() / repeats.numel() - 0.5) < 0.02 and bool((repeats[draws[..., 0] >= 0.5] == 1).all())
    # Log-uniform counts have half their mass below the square root of the bound.
    assert abs(float((aged < 4000**0.5).double().mean()) - 0.5) < 0.02


@pytest.mark.parametrize("training", [TrainingConfig(), TrainingConfig(steps=10, memory_ageing=4000)])
def test_no_segment_is_aged_by_default_or_at_the_start(training):
    assert bool((memory_repeats(training, 0, torch.rand(3, 4, 2)) == 1).all())
