"""A run equals its plain torch specification, so that errors common to all layouts are detected too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train.data.dataset import TokenDataset
from infini_train.reference.plain_model import train_plainly
from tests.support.distributed.assemble import global_memory, global_weights

STEPS = 4


BEYOND_THE_PAPER = {"write_strength": "learned", "normaliser": "corrected"}


@pytest.mark.parametrize(
    "rule,first_segment,ageing,more",
    [
        ("linear", "paper", 1, {}),
        ("linear", "paper", 40, {}),
        ("delta", "local_only", 40, {}),
        ("linear", "paper", 40, {"write_strength": "learned"}),
        ("delta", "paper", 1, BEYOND_THE_PAPER),
        ("linear", "paper", 40, {"short_convolution": 3, "feature_map": "softmax"}),
        ("delta", "paper", 1, {"short_convolution": 3, "short_convolution_reach": "document"}),
    ],
)
def test_a_run_equals_plain_torch(rule, first_segment, ageing, more, pool, run_config):
    model = replace(run_config.model, update_rule=rule, first_segment=first_segment, initial_gate=0.3, **more)
    curriculum = 0.5 if more else 0.0
    training = replace(run_config.training, memory_ageing=ageing, memory_ageing_rise=0.0, length_curriculum=curriculum)
    run = replace(run_config, model=model, training=training)
    results = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)
    dataset = TokenDataset(Path(run.data.path), "train")
    expected = train_plainly(run, dataset, global_weights(results, "initial"), STEPS)
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert results[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert min(expected["grad_norm"]) > run.optimizer.clip_grad_norm, "the comparison should include clipping"
    weights = global_weights(results)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for layer, memory in global_memory(results).items():
        for ours, theirs in zip(memory, expected["memory"][layer - 1], strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
