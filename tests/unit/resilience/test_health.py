"""Detection of loss spikes."""

from __future__ import annotations

import pytest

from infini_train.resilience.health import robust_zscore


def test_zscore_unit_is_the_median_absolute_deviation():
    window = [2.0, 3.0, 4.0, 5.0, 6.0]
    assert robust_zscore(4.0 + 3 * 1.4826, window) == pytest.approx(3.0)
    assert robust_zscore(1.0, window) < 0


def test_outlier_in_the_window_does_not_hide_a_spike():
    window = [4.0, 4.1, 3.9, 4.05, 1000.0, 3.95, 4.0]
    assert robust_zscore(6.0, window) > 8


def test_noise_after_a_constant_loss_is_no_spike():
    assert robust_zscore(4.1, [4.0] * 10) == pytest.approx(2.5)
    assert robust_zscore(0.0, [0.0] * 10) == 0.0
