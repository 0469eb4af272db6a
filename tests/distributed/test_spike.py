"""Loss spikes are reported, or rolled back with their data skipped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.folder import list_checkpoints
from infini_train.config import CheckpointConfig, HealthConfig
from tests.support.distributed.cases import Case


@pytest.fixture
def run(run_config, tmp_path):
    run = Case(dp=2).apply(run_config)
    return replace(
        run,
        run_dir=str(tmp_path / "run"),
        training=replace(run.training, steps=10, windows_per_step=1, self_test=False),
        checkpoint=CheckpointConfig(every=4),
        health=HealthConfig(spike_window=5, on_spike="rollback", max_rollbacks=1),
    )


def records(run):
    lines = (Path(run.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_spike_rolls_back_to_the_checkpoint_and_skips_its_data(run, pool):
    """The fault is on one rank. All ranks go back from step 7 to step 4, and continue reading after step 7."""
    for result in pool(2).run("tests.support.distributed.health_jobs", "pretrain_with_spikes", run, 1, [7]):
        assert result["end"] == 0
        seen = result["seen"]
        assert [each["step"] for each in seen] == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
        at_checkpoint, after = seen[4], seen[7]
        for name, value in at_checkpoint["all"].items():
            assert torch.equal(after["all"][name], value), f"{name} is not that of the checkpoint"
        assert at_checkpoint["memory"] > 0 and after["memory"] == 0, "the memory must be empty after a rollback"
        read = [each["positions"] for each in seen]
        assert not any(torch.equal(after["positions"], each) for each in read[:7])
        # Each step reads the same number of segments. Seven steps were read before training continued from step 4.
        undisturbed = pool(2).run("tests.support.distributed.health_jobs", "positions_after", run, 7)
        assert any(torch.equal(after["positions"], each) for each in undisturbed)
    found = [(each["step"], each["spike"]) for each in records(run)]
    assert found == [*((n, 0) for n in range(1, 7)), (7, 1), *((n, 0) for n in range(5, 11))]


def test_spike_after_the_last_rollback_stops_the_run(run, pool):
    results = pool(2).run("tests.support.distributed.health_jobs", "pretrain_with_spikes", run, 0, [7, 11])
    message, code = results[0]["end"]
    assert results[1]["end"] == (message, code)
    assert code == 87 and "step 8 is a spike after 1 rollbacks (health.max_rollbacks)" in message and "\n" not in message


def test_save_in_progress_completes_before_the_run_stops(run, pool):
    """The last spike is at step 8, which is the eleventh trained step after the rollback of step 7."""
    run = replace(run, checkpoint=replace(run.checkpoint, every=1))
    results = pool(2).run("tests.support.distributed.health_jobs", "pretrain_with_spikes", run, 0, [7, 11], 1.5)
    message, code = results[0]["end"]
    assert code == 87 and "is a spike after 1 rollbacks" in message
    last = int(message.split("step ")[1].split()[0])
    saved = sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir())
    assert saved[-1] == f"step_{last - 1:08d}" and list_checkpoints(Path(run.run_dir))[-1].name == saved[-1]


def test_spike_is_only_reported_by_default(run, pool):
    run = replace(run, health=replace(run.health, on_spike="report"))
    results = pool(2).run("tests.support.distributed.health_jobs", "pretrain_with_spikes", run, 1, [7])
    assert [result["end"] for result in results] == [0, 0]
    assert [each["spike"] for each in records(run)] == [0] * 6 + [1] + [0] * 3
    assert [each["step"] for each in records(run)] == list(range(1, 11))
