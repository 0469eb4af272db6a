"""Skipped steps: after a value that is not finite on one rank, all ranks skip the step and keep nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import torch

from infini_train.config import CheckpointConfig, HealthConfig, LayoutConfig
from infini_train.config.validation import ATTENTION
from tests.support.distributed.cases import Case

MATRIX, NORM = "mlp.linear_fc2.weight", "input_layernorm.weight"
CASES = [
    *((Case(dp=2, zero=zero), {}) for zero in (0, 2, 3)),
    *((Case(pp=2, zero=zero), {}) for zero in (0, 1)),
    *((Case(tp=2, zero=zero), {}) for zero in (0, 1, 3)),
    (Case(cp=2), {}),
    *((Case(dp=2, zero=zero), {"offload"}) for zero in (1, 2, 3)),
    (Case(dp=2), {"bfloat16"}),
    (Case(tp=2), {"bfloat16"}),
    (Case(pp=2, virtual=2, recompute="stage"), {"bfloat16"}),
    (Case(tp=2, pp=2, zero=2), {}),
]


def name(value):
    return value.name if isinstance(value, Case) else "-".join(value)


def configure(case, options, run_config):
    run = case.apply(run_config)
    run = replace(run, training=replace(run.training, windows_per_step=1))
    if "offload" in options:
        run = replace(run, layout=replace(run.layout, offload_optimizer=True))
    if "bfloat16" in options:
        run = replace(run, training=replace(run.training, precision="bfloat16"))
    return run


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_attention_skips_a_step(attention, pool, run_config):
    run = configure(Case(), {}, replace(run_config, model=replace(run_config.model, attention=attention)))
    (result,) = pool(1).run("tests.support.distributed.health_jobs", "skip_a_step", run, 0, MATRIX, float("inf"))
    assert result["skipped"] == [0, 0, 1, 0] and result["changed_by_the_skipped_step"] == []


@pytest.mark.parametrize("case,options", CASES, ids=name)
def test_all_ranks_skip_a_step_with_one_bad_gradient(case, options, pool, run_config):
    """A replicated vector is poisoned on the last tensor rank, whose copy is not part of the gradient norm."""
    parameter, value = (NORM, float("nan")) if case.tp > 1 else (MATRIX, float("inf"))
    results = pool(case.processes).run(
        "tests.support.distributed.health_jobs",
        "skip_a_step",
        configure(case, options, run_config),
        case.processes - 1,
        parameter,
        value,
    )
    for result in results:
        assert result["skipped"] == [0, 0, 1, 0]
        assert [isfinite(norm) for norm in result["grad_norm"]] == [True, True, False, True]
        assert result["changed_by_the_skipped_step"] == []
        assert [n for n in result["unchanged_by_the_next"] if not n.startswith("exp_avg")] == []
        first, second, skipped, last = result["tokens"]
        assert first < second == skipped < last
        consecutive, after = result["health"]
        assert consecutive == 1
        assert (after["skipped_steps"], after["consecutive_skips"]) == (1, 0)
        for states in result["memory"].values():
            assert all(torch.isfinite(state).all() and state.any(dim=-1).all() for state in states), (
                "the memory lacks the text of the step"
            )


@pytest.mark.parametrize("case", [Case(dp=2), Case(pp=2), Case(tp=2, zero=0)], ids=name)
def test_memory_of_a_poisoned_row_is_emptied_and_others_keep_theirs(case, pool, run_config):
    """NaN in the forward of one row on the last rank must not stay in the streams."""
    results = pool(2).run("tests.support.distributed.health_jobs", "skip_a_step", case.apply(run_config), 1, None, 0.0)
    poisoned = results[1]["rows"][0]
    for result in results:
        assert result["skipped"] == [0, 0, 1, 0]
        assert result["changed_by_the_skipped_step"] == []
        for states in result["memory"].values():
            for part in states:
                assert torch.isfinite(part).all()
                filled = dict(zip(result["rows"], part.flatten(1).any(dim=1).tolist(), strict=True))
                assert filled == {row: row != poisoned for row in result["rows"]}


def pretrain(pool, run_config, folder, first, last, **training):
    run = replace(
        run_config,
        run_dir=str(folder / "run"),
        layout=LayoutConfig(pipeline_parallel_size=2),
        training=replace(run_config.training, windows_per_step=1, self_test=False, **training),
        checkpoint=CheckpointConfig(every=2),
        health=HealthConfig(max_consecutive_skips=3),
    )
    results = pool(2).run("tests.support.distributed.health_jobs", "pretrain_with_bad_gradients", run, 1, first, last)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return results, records, sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_run_stops_after_too_many_skips(pool, run_config, tmp_path):
    results, records, checkpoints = pretrain(pool, run_config, tmp_path, 3, 8)
    assert results[0] == results[1]
    message, code = results[0]
    assert code == 87
    assert "3 steps in a row" in message and "health.max_consecutive_skips" in message and "step 5;" in message
    assert str(tmp_path / "run" / "checkpoints" / "step_00000002") in message and "\n" not in message
    assert checkpoints == ["step_00000002"], "a checkpoint was saved after the bad steps"
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1]
    assert [record["grad_norm"] is None for record in records] == [False, False, True, True, True]
    assert Path(tmp_path / "run" / "metrics.jsonl").read_text().count("NaN") == 0


def test_skips_are_counted_across_a_checkpoint(pool, run_config, tmp_path):
    """The last step is always saved, even if skipped: with the weights from before the skips, and its own step number."""
    assert pretrain(pool, run_config, tmp_path, 3, 8, steps=4)[0] == [0, 0]
    results, records, checkpoints = pretrain(pool, run_config, tmp_path, 3, 8)
    message, code = results[0]
    assert code == 87 and "3 steps in a row" in message and "step 5;" in message
    assert checkpoints == ["step_00000002", "step_00000004"]
    assert "step_00000004, has the weights from before them" in message
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1]


def test_run_continues_after_fewer_skips(pool, run_config, tmp_path):
    """A checkpoint that is due at a skipped step is saved after the next good step."""
    results, records, checkpoints = pretrain(pool, run_config, tmp_path, 5, 6)
    assert results == [0, 0]
    assert [record["skipped"] for record in records] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert checkpoints == ["step_00000007", "step_00000008"]


def test_checkpoint_keeps_skip_counts_and_adam_steps(pool, run_config, tmp_path):
    run = replace(Case(dp=2).apply(run_config), run_dir=str(tmp_path / "run"))
    for result in pool(2).run("tests.support.distributed.health_jobs", "load_after_a_skip", run):
        assert result["different"] == []
        assert (result["health"]["skipped_steps"], result["health"]["consecutive_skips"]) == (1, 1)
        assert result["adam_steps"] == {1.0}
