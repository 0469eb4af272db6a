"""Real cluster failures during a run; afterwards it resumes with bitwise equal results."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infini_train.checkpoint.folder import list_checkpoints
from infini_train.config import CheckpointConfig, LayoutConfig, RunConfig, save_config
from tests.distributed.test_checkpoint import elsewhere, metrics
from tests.support.distributed.command import REPOSITORY
from tests.support.warm.interpreter import launcher, python

RUN_WITH_A_FAULT = """
import os, sys
from launch.rank_processes import RankProcesses, free_port, rank_environments
from launch.stop_signals import StopSignals
environments = rank_environments(0, 1, int(sys.argv[1]), "127.0.0.1", free_port(), dict(os.environ))
sys.exit(RankProcesses([sys.executable, "-m", *sys.argv[2:]], environments, StopSignals()).wait())
"""


def pretrain(run: RunConfig, processes: int, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pretrain` under the launcher, optionally with a fault (NAME@RANK@STEP) on one rank."""
    path = Path(run.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    config = path.with_suffix(".yaml")
    save_config(run, config)
    module = ["infini_train"] if fault is None else ["tests.support.distributed.faults", fault]
    return subprocess.run(
        [python(), "-c", RUN_WITH_A_FAULT, str(processes), *module, "pretrain", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def run(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four ranks (two stages of two) with a checkpoint every four steps and an evaluation every six."""
    return replace(
        run_config,
        run_dir=str(tmp_path_factory.mktemp("runs") / "undisturbed"),
        layout=LayoutConfig(pipeline_parallel_size=2, zero_stage=1),
        training=replace(run_config.training, steps=12, self_test=False),
        evaluation=replace(run_config.evaluation, every=6),
        checkpoint=CheckpointConfig(every=4),
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig) -> list[dict[str, Any]]:
    result = pretrain(run, 4)
    assert result.returncode == 0, result.stdout
    return metrics(run)


@pytest.fixture(scope="module")
def pair(run: RunConfig) -> RunConfig:
    """The same run on two ranks, one per stage. It starts in half the time, and its ranks still have different roles."""
    return elsewhere(run, "undisturbed pair")


@pytest.fixture(scope="module")
def undisturbed_pair(pair: RunConfig) -> list[dict[str, Any]]:
    result = pretrain(pair, 2)
    assert result.returncode == 0, result.stdout
    return metrics(pair)


@pytest.mark.parametrize(
    "fault,goes_on_from",
    [
        ("kill_before_shards@2@8", 4),
        ("kill_inside_a_shard@2@8", 4),
        ("kill_before_marker@0@8", 4),
        ("kill_before_retention@0@8", 8),
    ],
)
def test_rank_killed_during_a_save(fault, goes_on_from, run, undisturbed):
    hit = elsewhere(run, fault.partition("@")[0])
    result = pretrain(hit, 4, fault)
    assert result.returncode == 128 + 9, result.stdout
    assert list_checkpoints(Path(hit.run_dir))[-1].name == f"step_{goes_on_from:08d}"
    result = pretrain(hit, 4)
    assert result.returncode == 0 and f"resuming from {hit.run_dir}/checkpoints/step_{goes_on_from:08d}" in result.stdout
    assert metrics(hit) == undisturbed
    left = sorted(path.name for path in (Path(hit.run_dir) / "checkpoints").iterdir())
    assert left == ["step_00000008", "step_00000012"], "files of the interrupted save were not deleted"


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "unreadable manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_used(harm, pair, undisturbed_pair):
    hit = elsewhere(pair, harm)
    shutil.copytree(pair.run_dir, hit.run_dir)
    shard = Path(hit.run_dir) / "checkpoints" / "step_00000012" / "__1_0.distcp"
    if harm == "unreadable manifest":
        manifest = shard.with_name("manifest.json")
        manifest.unlink()
        manifest.mkdir()
    elif harm == "delete":
        shard.unlink()
    elif harm == "truncate":
        os.truncate(shard, 100)
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    result = pretrain(hit, 2)
    assert result.returncode == 0, result.stdout
    flat = " ".join(result.stdout.split())
    named = "manifest.json cannot be read" if harm == "unreadable manifest" else "is damaged: __1_0.distcp"
    assert named in flat and "step_00000012 is damaged" in flat and "resuming from" in flat and "step_00000008" in flat
    assert metrics(hit) == undisturbed_pair


def test_run_without_a_readable_checkpoint_does_not_start_from_scratch(pair, undisturbed_pair):
    """It would overwrite the checkpoints, although the storage may only have failed for a while."""
    hit = elsewhere(pair, "none can be read")
    shutil.copytree(pair.run_dir, hit.run_dir)
    checkpoints = list_checkpoints(Path(hit.run_dir))
    away = Path(hit.run_dir) / "away"
    away.mkdir()
    for path in checkpoints:
        (path / "__1_0.distcp").rename(away / path.name)
    result = pretrain(hit, 2)
    assert result.returncode == 2, result.stdout
    flat = " ".join(result.stdout.split())
    assert "of its 2 checkpoint(s) none can be read (step_00000012: __1_0.distcp cannot be read" in flat
    assert "Traceback" not in flat and list_checkpoints(Path(hit.run_dir)) == checkpoints
    assert metrics(hit) == undisturbed_pair
    for path in checkpoints:
        (away / path.name).rename(path / "__1_0.distcp")
    assert "resuming from" in pretrain(hit, 2).stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_metrics_on_a_full_disk_lose_only_records(pair):
    hit = elsewhere(pair, "no room for metrics")
    Path(hit.run_dir).mkdir(parents=True)
    (Path(hit.run_dir) / "metrics.jsonl").symlink_to("/dev/full")
    result = pretrain(hit, 2)
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
    assert result.stdout.count("training goes on, and tries again") == 1 and "the newest records are lost" in result.stdout
    assert [path.name for path in list_checkpoints(Path(hit.run_dir))] == ["step_00000008", "step_00000012"]


def test_rank_that_fails_alone_exits_without_waiting(pair):
    """The other ranks wait for it in a collective, and NCCL would wait for them when it destroys its process groups.

    So it must exit without destroying them; the launcher then ends the others.
    """
    hit = elsewhere(pair, "fails alone")
    result = pretrain(hit, 2, "fail_in_data@1@4")
    assert result.returncode == 1, result.stdout
    assert "RuntimeError: on purpose" in result.stdout and "left its groups" not in result.stdout


def test_disk_full_once_loses_only_one_checkpoint(pair, undisturbed_pair):
    hit = elsewhere(pair, "full once")
    result = pretrain(hit, 2, "no_space_once@1@4")
    assert result.returncode == 0, result.stdout
    assert "checkpoint of step 4 failed: rank 1" in result.stdout and "training goes on" in result.stdout
    assert metrics(hit) == undisturbed_pair
    assert sorted(path.name[5:] for path in (Path(hit.run_dir) / "checkpoints").iterdir()) == ["00000008", "00000012"]


def test_disk_that_stays_full_stops_the_run_on_all_ranks(pair, undisturbed_pair):
    hit = elsewhere(pair, "full for good")
    result = pretrain(hit, 2, "no_space_from_then_on@1@8")
    assert result.returncode == 2, result.stdout
    assert "could not be written: rank 1" in result.stdout and "Traceback" not in result.stdout
    assert list_checkpoints(Path(hit.run_dir))[-1].name == "step_00000004"
    assert pretrain(hit, 2).returncode == 0
    assert metrics(hit) == undisturbed_pair


def test_failed_remote_copies_do_not_affect_the_run(pair, undisturbed_pair):
    hit = elsewhere(pair, "no copies")
    hit = replace(hit, checkpoint=replace(pair.checkpoint, copy_to="file:///dev/null/archive"))
    result = pretrain(hit, 2)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("was not copied to file:///dev/null/archive") == 3 and "failed" not in result.stdout
    assert metrics(hit) == undisturbed_pair
    assert sorted(path.name[5:] for path in (Path(hit.run_dir) / "checkpoints").iterdir()) == ["00000008", "00000012"]


def test_stalled_writer_is_named(pair, undisturbed_pair):
    hit = replace(elsewhere(pair, "stalled"), checkpoint=CheckpointConfig(every=4, timeout_seconds=8.0))
    result = pretrain(hit, 2, "stall@1@4")
    assert result.returncode == 2, result.stdout
    assert "the checkpoint of step 4 did not end: rank 1 has not written its files after 8 s" in result.stdout
    assert list_checkpoints(Path(hit.run_dir)) == []
    hit = replace(hit, checkpoint=pair.checkpoint)
    assert pretrain(hit, 2).returncode == 0
    assert metrics(hit) == undisturbed_pair


# The save of step 4 runs in the background. On a busy machine it may last until the save of step 8 waits for it.
@pytest.mark.parametrize("fault,stops_at", [("terminate_in_save@1@4", range(4, 9)), ("terminate_in_evaluation@1@6", (6, 7))])
def test_two_stop_signals_to_one_rank(fault, stops_at, pair, undisturbed_pair):
    hit = elsewhere(pair, fault.partition("@")[0])
    result = pretrain(hit, 2, fault)
    assert result.returncode == 85, result.stdout
    assert result.stdout.count("the same command goes on from there") == 1
    assert len(metrics(hit)) in stops_at
    assert list_checkpoints(Path(hit.run_dir))[-1].name == f"step_{len(metrics(hit)):08d}"
    assert pretrain(hit, 2).returncode == 0
    assert metrics(hit) == undisturbed_pair


def test_synchronous_and_asynchronous_saves_write_the_same_bytes(pair, undisturbed_pair):
    waiting = replace(elsewhere(pair, "waiting"), checkpoint=replace(pair.checkpoint, asynchronous=False))
    assert pretrain(waiting, 2).returncode == 0
    assert metrics(waiting) == undisturbed_pair
    one, other = (Path(each.run_dir) / "checkpoints" / "step_00000012" for each in (pair, waiting))
    shards = sorted(path.name for path in one.glob("*.distcp"))
    assert len(shards) == 2 and shards == sorted(path.name for path in other.glob("*.distcp"))
    for name in shards:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("reader", ["full disk", "closed pipe"])
def test_unwritable_log_does_not_end_a_run(reader, pair, undisturbed_pair):
    run = elsewhere(pair, reader.replace(" ", "_"))
    save_config(run, Path(run.run_dir).with_suffix(".yaml"))
    if reader == "full disk":
        log = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, log = os.pipe()
        os.close(reading)
    try:
        command = [*launcher(REPOSITORY / "launch" / "local.py"), "2", "pretrain"]
        result = subprocess.run(
            [*command, "--config", str(Path(run.run_dir).with_suffix(".yaml"))],
            stdout=log,
            stderr=log,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    finally:
        os.close(log)
    assert result.returncode == 0
    assert metrics(run) == undisturbed_pair
