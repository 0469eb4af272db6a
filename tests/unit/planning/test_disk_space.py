"""Disk usage in the plan, compared with the code that keeps and deletes checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.checkpoint import folder
from infini_train.cli.main import main
from infini_train.config import CheckpointConfig, LayoutConfig, RunConfig
from infini_train.planning.disk_space import checkpoint_bytes, kept_checkpoints
from infini_train.planning.parameter_counts import total_parameters
from tests.unit.planning.test_planning import small, with_layout


def kept(tmp_path: Path, run: RunConfig) -> tuple[int, int]:
    """Return the number of checkpoints at the end, and the largest number at any time."""
    most = 0
    for step in range(1, run.training.steps + 1):
        if step % run.checkpoint.every == 0 or step == run.training.steps:
            folder.commit(folder.start_folder(tmp_path, step), {})
            most = max(most, len(folder.list_checkpoints(tmp_path)))
            folder.retain(tmp_path, step, run.checkpoint.keep, run.checkpoint.keep_every)
    return len(folder.list_checkpoints(tmp_path)), most


@pytest.mark.parametrize("steps", [1, 5, 24, 30])
@pytest.mark.parametrize(("every", "keep", "keep_every"), [(5, 2, 0), (5, 2, 10), (4, 3, 6), (5, 2, 5), (1, 4, 7), (50, 2, 3)])
def test_number_of_kept_checkpoints_is_as_planned(steps: int, every: int, keep: int, keep_every: int, tmp_path: Path):
    run = replace(small(steps=steps), checkpoint=CheckpointConfig(every=every, keep=keep, keep_every=keep_every))
    at_the_end, most = kept(tmp_path, run)
    assert kept_checkpoints(run) == at_the_end
    assert most <= at_the_end + 1


def test_checkpoint_size_is_master_weights_moments_and_memory_states_of_all_rows():
    run = small(rows=3)
    # For each of 2 layers and 3 rows: M [1 group, 4, 4] and z [1 group, 4].
    expected = 12 * total_parameters(run) + 2 * 3 * (16 + 4) * 4
    assert checkpoint_bytes(run) == expected
    split = with_layout(run, pipeline_parallel_size=2, virtual_stages=1)
    assert split.layout != LayoutConfig() and checkpoint_bytes(split) == expected


def test_the_plan_prints_the_disk_usage(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", "configs/8b.yaml", "--gpus", "64", "--gpu", "h100-80gb"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints"))
    assert line.split(maxsplit=1)[1] == "97.4 GB each; 26 stay at the end: 2.5 TB; one more while it is written"
