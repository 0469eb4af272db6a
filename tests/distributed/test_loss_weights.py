"""Loss weights: every layout computes Σ w·loss / Σ w of the global batch, and weights of 1 give bitwise equal results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infini_train.config import LayoutConfig, RunConfig, TaskConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.manifest import load_manifest
from infini_train.data.preparation import prepare
from infini_train.reference.plain_model import train_plainly
from tests.distributed.test_layouts import assert_same_run
from tests.support.corpus import small_run
from tests.support.distributed.assemble import global_weights

STEPS = 2


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A passkey task whose few tokens with a large weight are spread unevenly over rows and segments."""
    folder = tmp_path_factory.mktemp("weighted")
    run = small_run(folder)
    task = TaskConfig(kind="passkey", samples=24, held_out_samples=4, min_tokens=140, max_tokens=200, other_weight=0.05)
    run = replace(run, data=replace(run.data, vocab_size=384), task=task)
    prepare(run)
    return run


def test_layouts_equal_one_process_and_plain_torch(weighted, pool):
    training = replace(weighted.training, segments_per_micro_batch=2, micro_batches_per_window=2)
    run = replace(weighted, training=training)
    reference = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)
    dataset = TokenDataset(Path(run.data.path), "train")
    expected = train_plainly(run, dataset, global_weights(reference, "initial"), STEPS)
    assert reference[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert reference[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", None):
        layout = LayoutConfig() if size is None else LayoutConfig(**{size: 2})
        results = pool(2).run("tests.support.distributed.jobs", "train", replace(run, layout=layout), STEPS)
        assert_same_run(results, reference)


def test_weights_of_one_are_bitwise_equal_to_no_weights(weighted, pool, tmp_path):
    """Train on the same tokens with weights of 1 and without weights: loss, gradient norm and all parameters are equal."""
    run = replace(weighted, run_dir=str(tmp_path / "run"), data=replace(weighted.data, path=str(tmp_path / "ones")))
    run = replace(run, task=replace(run.task, other_weight=1.0))
    prepare(run)
    ones = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)[0]
    manifest = load_manifest(Path(run.data.path))
    assert manifest.weight_levels == [1.0, 1.0]
    manifest.weight_levels = None
    manifest.save(Path(run.data.path))
    assert not TokenDataset(Path(run.data.path), "train").weighted
    without = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)[0]
    assert ones["loss"] == without["loss"] and ones["grad_norm"] == without["grad_norm"]
    for name, (*_, value) in ones["weights"].items():
        assert np.array_equal(value.numpy(), without["weights"][name][-1].numpy()), name
    weighted_loss = pool(1).run("tests.support.distributed.jobs", "train", weighted, STEPS)[0]["loss"]
    # The second step reads answers, whose weights differ between the two data sets.
    assert abs(weighted_loss[1] / ones["loss"][1] - 1) > 1e-5, "other weights must change the second loss"
