"""Watchdog: a hanging rank is named, all ranks dump their stacks, and the job ends. Slow starts and saves raise no alarm."""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.config import CheckpointConfig, HealthConfig
from infini_train.resilience.watchdog import HANG_EXIT_CODE
from tests.distributed.test_checkpoint import finish, start, wait_for_step
from tests.distributed.test_failures import pretrain
from tests.support.distributed.cases import Case


@pytest.fixture
def run(run_config, tmp_path):
    """A run with more steps than a test waits for, and a time limit of a few seconds."""
    run = replace(
        run_config,
        run_dir=str(tmp_path / "run"),
        training=replace(run_config.training, steps=100_000, self_test=False),
        checkpoint=CheckpointConfig(every=100_000),
        health=HealthConfig(hang_seconds=4.0, spike_zscore=0.0),
    )
    return Case(pp=2, window=(1, 4)).apply(run)


def stacks(run):
    return {path.name: path.read_text(encoding="utf-8") for path in (Path(run.run_dir) / "stacks").iterdir()}


@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_is_named_and_the_job_ends(stopped, run):
    # Use normal interpreters for the ranks: the warm interpreter's client cannot forward SIGSTOP.
    process = start(run, 2, lambda script: [sys.executable, str(script)])
    wait_for_step(run, 3, process)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[stopped], signal.SIGSTOP)
    output = finish(process, HANG_EXIT_CODE)
    error = [line for line in output.splitlines() if "error" in line]
    assert len(error) == 1, output
    named = re.search(
        r"the job hangs: rank (\d) \(host \S+, pid (\d+), stopped by a signal\) for \d+ s in (.+?)\. Stacks", error[0]
    )
    assert named, error
    assert (int(named[1]), int(named[2])) == (stopped, ranks[stopped])
    assert re.search(r" in step \d+$", named[3]) and "; rank" not in named[3]
    assert "Traceback" not in output
    found = stacks(run)
    assert sorted(found) == ["rank_0.txt", "rank_1.txt"]
    for text in found.values():
        assert "loop.py" in text and "watchdog.py" in text, "the stacks of the training thread or of the watchdog are missing"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "the stopped rank was not killed"


def test_stuck_rank_is_named_and_not_those_that_wait_for_it(run):
    """Its process is alive and sends heartbeats; the others are in operations that only wait."""
    run = Case(dp=2, window=(1, 4)).apply(run)
    result = pretrain(run, 2, "hang_in_data@1@4")
    assert result.returncode == HANG_EXIT_CODE, result.stdout
    assert re.search(r"the job hangs: rank 1 \(host \S+, pid \d+\) for \d+ s in reading data in step 4\. Stacks", result.stdout)
    assert "Traceback" not in result.stdout
    assert "faults.py" in stacks(run)["rank_1.txt"] and "faults.py" not in stacks(run)["rank_0.txt"].split("loop.py")[0]


@pytest.mark.parametrize("step", [2, 4])
def test_rank_that_left_but_does_not_exit_is_named(step, run):
    """Its heartbeats ended with its watchdog, the last one possibly in the first step. The others wait for it."""
    run = Case(dp=2, window=(1, 4)).apply(run)
    result = pretrain(run, 2, f"leave_in_data@1@{step}")
    assert result.returncode == HANG_EXIT_CODE, result.stdout
    assert "the job hangs: rank 1 (host" in result.stdout


def test_slow_first_step_and_slow_save_raise_no_alarm(run, pool):
    """On one rank, each takes much longer than the limit of an ordinary operation; the other rank waits for it."""
    run = replace(run, training=replace(run.training, steps=3), checkpoint=CheckpointConfig(every=2, asynchronous=False))
    assert pool(2).run("tests.support.distributed.health_jobs", "pretrain_slowly", run, 1, 9.0) == [0, 0]
    assert not list(Path(run.run_dir).glob("heartbeats-*")) and not (Path(run.run_dir) / "stacks").exists()
