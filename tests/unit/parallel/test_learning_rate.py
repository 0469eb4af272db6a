"""Learning rate schedules."""

from __future__ import annotations

import itertools

import pytest

from infini_train.config import OptimizerConfig
from infini_train.parallel.deepspeed.learning_rate import learning_rate_factor


def test_cosine_warms_up_peaks_and_ends_at_the_final_rate():
    optimizer = OptimizerConfig(warmup_steps=10, final_learning_rate_fraction=0.1)
    factors = [learning_rate_factor(optimizer, 100, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert factors[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)


def test_wsd_stays_at_the_peak_and_decays_linearly():
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=20, final_learning_rate_fraction=0.0)
    factors = [learning_rate_factor(optimizer, 100, step) for step in range(100)]
    assert factors[10:80] == [1.0] * 70
    assert factors[80] == pytest.approx(0.95)
    assert factors[89] == pytest.approx(0.5)
    assert factors[99] == 0.0


@pytest.mark.parametrize("decay_steps", [1, 2, 7])
def test_wsd_ends_at_the_final_rate(decay_steps):
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=decay_steps, final_learning_rate_fraction=0.1)
    assert learning_rate_factor(optimizer, 100, 99) == pytest.approx(0.1)
    assert learning_rate_factor(optimizer, 100, 99 - decay_steps) == 1.0


def test_no_warm_up():
    assert learning_rate_factor(OptimizerConfig(warmup_steps=0), 10, 0) == 1.0


@pytest.mark.parametrize("total,warmup", [(100, 99), (100, 98), (1, 0)])
def test_the_last_step_has_the_final_rate_even_if_the_decay_starts_late(total, warmup):
    optimizer = OptimizerConfig(warmup_steps=warmup, final_learning_rate_fraction=0.1)
    assert learning_rate_factor(optimizer, total, total - 1) == pytest.approx(0.1)
