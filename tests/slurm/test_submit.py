"""Runs on a real SLURM: after a failure or interruption, the metrics equal those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from infini_train.config import CheckpointConfig, LayoutConfig, RunConfig, save_config
from infini_train.data.preparation import prepare
from tests.distributed.test_checkpoint import metrics
from tests.support.corpus import small_run, write_corpus
from tests.support.slurm.cluster import SlurmCluster

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 240.0
STEPS = 60

PROFILE = {
    "gpus_per_node": 0,
    "processes_per_node": 1,
    "cpus_per_process": 1,
    "time_limit": "00:30:00",
    "signal_seconds": 120,
    "max_failures": 2,
    "preflight": False,
    "environment": {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"},
}


class Runs:
    """Submit runs with the command line, and inspect their results."""

    def __init__(self, cluster: SlurmCluster, run: RunConfig, folder: Path) -> None:
        self.cluster, self.run, self.folder = cluster, run, folder

    def command(self, *arguments: str, expected: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "infini_train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.cluster.environment(), "WANDB_API_KEY": SECRET, "WANDB_MODE": "disabled"},
            cwd=self.folder,
            timeout=120,
            check=False,
        )
        assert result.returncode == expected, result.stdout
        return result.stdout

    def submit(
        self, name: str, *arguments: str, run: RunConfig | None = None, expected: int = 0, **profile: object
    ) -> RunConfig:
        """Submit a run in its own folder, on 2 nodes by default, and return its configuration."""
        run = replace(run or self.run, run_dir=str(self.folder / name))
        config, profile_path = self.folder / f"{name}.yaml", self.folder / f"{name} profile.yaml"
        save_config(run, config)
        profile_path.write_text(yaml.safe_dump({**PROFILE, **profile}), encoding="utf-8")
        nodes = [] if "--nodes" in arguments else ["--nodes", "2"]
        self.last = self.command(
            "submit", "--config", str(config), "--profile", str(profile_path), *nodes, *arguments, expected=expected
        )
        return run

    def job_id(self) -> str:
        found = re.match(r"job (\d+)", self.last)
        assert found, self.last
        return found[1]

    def history(self, run: RunConfig) -> str:
        return (Path(run.run_dir) / "job" / "history").read_text(encoding="utf-8")

    def log(self, run: RunConfig) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((Path(run.run_dir) / "logs").glob("*.log")))

    def wait_for_step(self, run: RunConfig, step: int, job_id: str) -> None:
        path = Path(run.run_dir) / "metrics.jsonl"

        def reached(job: dict[str, str]) -> bool:
            assert job["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING"), self.log(run)
            return path.is_file() and path.read_text(encoding="utf-8").count("\n") >= step

        self.cluster.wait(job_id, reached, START_SECONDS)

    def pause(self, run: RunConfig) -> None:
        """Stop rank 0, and with it the run. SLURM sends CONT with TERM, which resumes the rank, but not with other signals."""
        self._signal(run, signal.SIGSTOP)

    def wake_when_told_to_stop(self, run: RunConfig, job_id: str) -> None:
        self.cluster.wait(job_id, lambda _: "told to stop; ranks save" in self.history(run), START_SECONDS)
        self._signal(run, signal.SIGCONT)

    def _signal(self, run: RunConfig, number: signal.Signals) -> None:
        os.kill(json.loads((Path(run.run_dir) / "lock.json").read_text())["pid"], number)

    def finish(self, run: RunConfig, job_id: str) -> None:
        self.cluster.wait(job_id, "COMPLETED", START_SECONDS)
        assert self.history(run).splitlines()[-1].endswith(": finished"), self.history(run)


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def runs(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("cluster runs")
    write_corpus(folder / "text")
    base = small_run(folder)
    prepare(base)
    run = replace(
        base,
        layout=LayoutConfig(pipeline_parallel_size=2, zero_stage=1),
        training=replace(base.training, steps=STEPS, self_test=False),
        evaluation=replace(base.evaluation, every=20),
        checkpoint=CheckpointConfig(every=10),
    )
    yield Runs(cluster, run, folder)


@pytest.fixture(scope="module")
def unbroken(runs):
    """Submit an undisturbed run, and return it with its job id."""
    run = runs.submit("unbroken")
    runs.cluster.wait(runs.job_id(), "COMPLETED", START_SECONDS)
    return run, runs.job_id()


def test_a_run_finishes_and_status_and_logs_show_it(unbroken, runs):
    run, job_id = unbroken
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    status = runs.command("status", run.run_dir)
    assert f"{job_id} COMPLETED" in status and f"step {STEPS} of {STEPS} (100%)" in status
    assert f"checkpoint  step_{STEPS:08d}" in status and status.rstrip().endswith(": finished")
    log = runs.command("logs", run.run_dir, "--follow", "--lines", "1000")
    assert f"trained to step {STEPS}" in log and "ranks meet at 127.0.0.1" in log
    assert runs.command("logs", run.run_dir, "--lines", "1").count("\n") == 1
    assert "is not running any more" in runs.command("cancel", run.run_dir)
    files = {path.relative_to(run.run_dir).as_posix() for path in Path(run.run_dir).rglob("*") if path.is_file()}
    assert {"job.sh", "job/config.yaml", "job/git.json", "job/submission.json", f"logs/{job_id}.log"} <= files
    assert all(SECRET.encode() not in (Path(run.run_dir) / name).read_bytes() for name in files), "the W&B key was written"


def test_a_finished_job_requeued_by_hand_exits_0(unbroken, runs, cluster):
    run, job_id = unbroken
    before = metrics(run)
    cluster.run("scontrol", "requeue", job_id)
    cluster.wait(job_id, lambda job: job["JobState"] == "COMPLETED" and job["Restarts"] == "1", START_SECONDS)
    assert cluster.job(job_id)["ExitCode"] == "0:0"
    assert runs.history(run).splitlines()[-1].endswith("finished before; nothing to do")
    assert metrics(run) == before


def test_at_the_time_limit_a_run_is_saved_requeued_and_resumed(unbroken, runs, cluster):
    run = runs.submit("time limit")
    job_id = runs.job_id()
    runs.wait_for_step(run, 3, job_id)
    runs.pause(run)
    # SLURM signals in the last 120 s before the end, and checks every 30 s.
    end = datetime.now() + timedelta(seconds=115)
    cluster.run("scontrol", "update", f"JobId={job_id}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")
    runs.wake_when_told_to_stop(run, job_id)
    cluster.wait(job_id, lambda job: job["Restarts"] == "1", START_SECONDS)
    # Otherwise the job would keep the short limit, which is not enough on a slow machine.
    cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")
    runs.finish(run, job_id)
    assert cluster.job(job_id)["Restarts"] == "1"
    saved = re.search(r"requeued: told to stop, exit code 85; newest checkpoint: (step_\d+)", runs.history(run))
    assert saved and f"checkpoints/{saved[1]}" in runs.log(run)
    assert metrics(run) == metrics(unbroken[0])


def test_a_preempted_run_is_saved_and_resumed(unbroken, runs, cluster):
    run = runs.submit("preempted")
    job_id = runs.job_id()
    runs.wait_for_step(run, 3, job_id)
    runs.pause(run)
    high = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1").strip()
    runs.wake_when_told_to_stop(run, job_id)
    cluster.wait(high, "COMPLETED", START_SECONDS)
    runs.finish(run, job_id)
    assert "requeued: told to stop, exit code 85" in runs.history(run)
    assert metrics(run) == metrics(unbroken[0])


def test_scontrol_requeue_and_a_second_job_on_the_same_run_directory(unbroken, runs, cluster):
    run = runs.submit("requeued")
    job_id = runs.job_id()
    runs.wait_for_step(run, 3, job_id)
    runs.submit("requeued", expected=2)
    assert f"has job {job_id}, which is RUNNING" in runs.last and runs.last.count("\n") == 1
    # Submit the script directly, without the check of `submit`.
    script = Path(run.run_dir) / "job.sh"
    runs.pause(run)
    second = cluster.run(
        "sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", f"--chdir={run.run_dir}", str(script)
    ).strip()
    cluster.wait(second, "FAILED", START_SECONDS)
    assert cluster.job(second)["ExitCode"] == "2:0"
    assert f"is in use by SLURM job {job_id} " in runs.log(run)
    cluster.run("scontrol", "requeue", job_id)
    runs.finish(run, job_id)
    assert cluster.job(job_id)["Restarts"] == "1" and "requeued by SLURM; this start ends" in runs.history(run)
    assert metrics(run) == metrics(unbroken[0])


def test_a_cancelled_run_stays_ended_and_can_be_submitted_again(unbroken, runs, cluster):
    run = runs.submit("cancelled")
    job_id = runs.job_id()
    runs.wait_for_step(run, 3, job_id)
    assert "saves and ends" in runs.command("cancel", run.run_dir)
    ended = cluster.wait(job_id, ("FAILED", "COMPLETED"), START_SECONDS)
    assert ended["Restarts"] == "0" and "cancelled (exit code 85)" in runs.history(run)
    steps = len(metrics(run))
    assert steps < STEPS and f"checkpoint  step_{steps:08d}" in runs.command("status", run.run_dir)
    # Cancel again, this time with scancel alone: the ranks have SLURM's KillWait to save.
    runs.submit("cancelled")
    job_id = runs.job_id()
    runs.wait_for_step(run, steps + 3, job_id)
    cluster.run("scancel", job_id)
    cluster.wait(job_id, "CANCELLED", START_SECONDS)
    time.sleep(2)
    assert cluster.job(job_id)["JobState"] == "CANCELLED"
    runs.submit("cancelled")
    runs.finish(run, runs.job_id())
    assert metrics(run) == metrics(unbroken[0])


@pytest.mark.parametrize("processes_too", [True, False], ids=["power", "network"])
def test_a_run_continues_without_a_lost_node(processes_too, unbroken, runs, cluster):
    """Lose the node of rank 0 and of the batch script. With only its network lost, both continue and must do no harm."""
    run = runs.submit(f"lost {processes_too}")
    job_id = runs.job_id()
    runs.wait_for_step(run, 3, job_id)
    lost = cluster.job(job_id)["BatchHost"]
    if not processes_too:
        runs.pause(run)
    cluster.kill_node(lost, processes_too=processes_too)
    cluster.wait(job_id, lambda job: job["Restarts"] == "1" and job["JobState"] == "RUNNING", START_SECONDS)
    assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.job(job_id)["NodeList"]).split()
    runs.wait_for_step(run, 20, job_id)
    if not processes_too:
        # Resume the remaining processes of the first start.
        for pid in cluster._job_processes(lost):
            os.kill(pid, signal.SIGCONT)
    runs.finish(run, job_id)
    assert cluster.job(job_id)["Restarts"] == "1", runs.history(run)
    assert metrics(run) == metrics(unbroken[0])


def test_a_job_that_always_crashes_stops_and_says_why(runs, cluster, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\n# Kill rank 1 while it writes the checkpoint of step 10.\n"
        f'if [ "$1 $2" = "-m infini_train" ]; then shift 2; '
        f'exec {shlex.quote(sys.executable)} -m tests.support.distributed.faults kill_before_shards@1@10 "$@"; fi\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    run = runs.submit("crashes", python=str(python))
    job_id = runs.job_id()
    ended = cluster.wait(job_id, "FAILED", 2 * START_SECONDS)
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "1:0")
    history = runs.history(run).splitlines()
    assert "requeued: a rank crashed or was killed, exit code 137; failure 1 of 2" in history[1]
    assert history[-1].endswith(
        "stopped: a rank crashed or was killed, exit code 137; 2 failures since the newest checkpoint (none), "
        "and max_failures is 2"
    )
    assert history[-1] in runs.command("status", run.run_dir)


def test_a_configuration_error_stops_the_job_at_once(runs, cluster):
    run = runs.submit("bad shard")
    job_id = runs.job_id()
    config = Path(run.run_dir) / "job" / "config.yaml"
    config.write_text(config.read_text().replace("num_layers", "num_layer"), encoding="utf-8")
    ended = cluster.wait(job_id, "FAILED", START_SECONDS)
    assert (ended["Restarts"], ended["ExitCode"]) == ("0", "2:0")
    assert "model.num_layers" in runs.log(run)
    assert "stopped: exit code 2" in runs.history(run)


def test_a_node_that_fails_the_preflight_is_excluded(unbroken, runs, cluster):
    bad = cluster.temporary_folder("n1")
    shutil.rmtree(bad)
    # Use a folder that even root cannot write. SLURM would replace anything that is not a folder.
    bad.symlink_to("/proc")
    run = runs.submit("bad node", "--name", "bad-node", preflight=True)
    job_id = runs.job_id()
    runs.finish(run, job_id)
    job = cluster.job(job_id)
    assert job["Restarts"] == "1" and job["ExcNodeList"] == "n1"
    assert "preflight: n1 will be left out" in runs.history(run)
    assert "excluded    n1" in runs.command("status", run.run_dir)
    assert metrics(run) == metrics(unbroken[0])


def test_an_array_of_three(runs, cluster):
    """The last task requeues itself. Its job id is that of the whole array, but the other tasks must stay ended."""
    single = replace(runs.run, layout=LayoutConfig(), checkpoint=CheckpointConfig(every=5))
    run = runs.submit("array", "--nodes", "1", "--sweep", "training.steps=5,10,60", run=single)
    job_id = runs.job_id()
    tasks = [replace(run, run_dir=f"{run.run_dir}/task_{task}") for task in range(3)]
    runs.wait_for_step(tasks[2], 3, f"{job_id}_2")
    runs.pause(tasks[2])
    for task in range(2):
        cluster.wait(f"{job_id}_{task}", "COMPLETED", START_SECONDS)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job_id}_2")
    runs.wake_when_told_to_stop(tasks[2], f"{job_id}_2")
    cluster.wait(f"{job_id}_2", lambda job: job["JobState"] == "COMPLETED" and job["Restarts"] == "1", START_SECONDS)
    restarts = [cluster.job(f"{job_id}_{task}")["Restarts"] for task in range(2)]
    assert restarts == ["0", "0"], "".join(runs.history(task) for task in tasks)
    assert [[record["step"] for record in metrics(task)] for task in tasks] == [list(range(1, n + 1)) for n in (5, 10, 60)]
    lines = runs.command("status", run.run_dir).splitlines()
    assert len(lines) == 4 and all("COMPLETED" in line and "(100%)" in line for line in lines[1:])
    assert "trained to step 10" in runs.command("logs", tasks[1].run_dir)
