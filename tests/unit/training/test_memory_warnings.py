"""Memory warnings appear when their condition holds, and only then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infini_train.config import ModelConfig, RunConfig, TrainingConfig
from infini_train.training.memory_warnings import memory_warnings

RUN = RunConfig(training=TrainingConfig(steps=100, segments_per_micro_batch=2, micro_batches_per_window=1))
GOOD: dict[str, Any] = {
    "step": 50,
    "gates": [[0.5, 0.51], [0.45, 0.5]],
    "held_out_loss": 3.0,
    "held_out_loss_memory_emptied": 3.1,
}


def test_no_warning_when_memory_is_used():
    assert memory_warnings(RUN, GOOD) == []
    assert memory_warnings(RUN, {"step": 50, "gates": GOOD["gates"]}) == []


def test_warning_of_stuck_gates_names_the_key():
    (warning,) = memory_warnings(RUN, GOOD | {"gates": [[0.5, 0.519], [0.481, 0.5]]})
    assert "gates are stuck" in warning and "optimizer.gate_learning_rate is 0.01" in warning
    elsewhere = replace(RUN, model=ModelConfig(initial_gate=-2.0))
    assert memory_warnings(elsewhere, GOOD) == []
    (warning,) = memory_warnings(elsewhere, GOOD | {"gates": [[0.12]]})
    assert "of 0.12, where they" in warning


@pytest.mark.parametrize("emptied", [3.0005, 2.9])
def test_warning_of_unused_memory_names_the_segments(emptied):
    (warning,) = memory_warnings(RUN, GOOD | {"held_out_loss_memory_emptied": emptied})
    assert f"by {emptied - 3.0:+.4f} nats" in warning and "2 segments a window" in warning


def test_no_warning_early_or_without_memory():
    bad = GOOD | {"gates": [[0.5]], "held_out_loss_memory_emptied": 3.0}
    assert len(memory_warnings(RUN, bad)) == 2
    assert memory_warnings(RUN, bad | {"step": 49}) == []
    local = {key: value for key, value in bad.items() if key != "gates"}
    assert memory_warnings(replace(RUN, model=ModelConfig(attention="local")), local) == []
