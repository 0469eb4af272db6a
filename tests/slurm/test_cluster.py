"""The test cluster behaves like a SLURM cluster, and leaves no processes or files behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.slurm.cluster import SlurmCluster
from tests.support.slurm.configuration import NODE_MARK
from tests.support.slurm.processes import node_processes, process_table, read
from tests.support.slurm.records import parse_records

LOST_SECONDS = 120.0


def submit(cluster: SlurmCluster, script: str, *options: str) -> str:
    return cluster.run("sbatch", "--parsable", *options, f"--wrap={script}").strip()


def output(cluster: SlurmCluster, job_id: str) -> str:
    """Return the output of a job so far."""
    path = Path(cluster.job(job_id)["StdOut"])
    return path.read_text() if path.exists() else ""


def traces_of(folder: Path) -> list[str]:
    """Return the processes that have a cluster's folder in their environment or command line."""
    words = {pid: read(f"/proc/{pid}/environ") + read(f"/proc/{pid}/cmdline") for pid, _, _ in process_table()}
    return [f"{pid}: {read(f'/proc/{pid}/cmdline')}" for pid, text in words.items() if str(folder) in text]


def test_three_nodes_are_idle(cluster):
    assert cluster.node_states() == {"n1": "IDLE", "n2": "IDLE", "n3": "IDLE"}
    assert cluster.run("sinfo", "--noheader", "--format=%R %c %G", "--partition=low").split() == ["low", "4", "gpu:2"]


def test_srun_runs_on_two_nodes_each_with_its_own_temporary_folder(cluster):
    script = 'echo "$SLURM_PROCID $SLURMD_NODENAME $TMPDIR $CUDA_VISIBLE_DEVICES"'
    lines = cluster.run("srun", "--nodes=2", "--gres=gpu:2", "bash", "-c", script).splitlines()
    assert sorted(lines) == [f"{rank} {node} {cluster.temporary_folder(node)} 0,1" for rank, node in enumerate(["n1", "n2"])]


def test_a_command_that_fails_raises_with_its_output(cluster):
    with pytest.raises(AssertionError, match=r"sbatch --partition=none.*\n.*invalid partition"):
        cluster.run("sbatch", "--partition=none", "--wrap=true")


def test_records_may_contain_spaces_and_equal_signs(cluster):
    job_id = submit(cluster, "true", "--job-name=a name=b", "--gres=gpu:1", "--comment=two words")
    job = cluster.wait(job_id, "COMPLETED")
    assert (job["JobName"], job["Comment"], job["TresPerNode"]) == ("a name=b", "two words", "gres:gpu:1")
    assert (job["ExitCode"], job["Restarts"], job["CPUs/Task"], job["TRES"]) == ("0:0", "0", "1", "cpu=1,node=1,billing=1")
    assert job_id in [record["JobId"] for record in cluster.jobs()]
    assert parse_records("No jobs in the system\n") == []


def test_each_task_of_an_array_is_a_job(cluster):
    job_id = submit(cluster, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    assert cluster.wait(f"{job_id}_0", "COMPLETED")["ExitCode"] == "0:0"
    assert cluster.wait(f"{job_id}_1", "FAILED")["ExitCode"] == "1:0"
    with pytest.raises(AssertionError, match="array of 2 tasks"):
        cluster.job(job_id)


def test_a_failed_wait_shows_the_job_and_its_log(cluster):
    job_id = submit(cluster, "echo the reason is here; exit 3")
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)is not COMPLETED.*JobState=FAILED.*ExitCode=3:0.*\nthe reason is here"):
        cluster.wait(job_id, "COMPLETED", timeout_seconds=60)
    assert time.monotonic() - start < 30, "a job that has ended was waited for"
    with pytest.raises(AssertionError, match="is not in the expected state after 1 s"):
        cluster.wait(job_id, lambda job: job["Restarts"] == "1", timeout_seconds=1)


def test_a_preempted_job_is_signalled_then_requeued(cluster):
    script = 'trap "echo got USR1" USR1; echo start $SLURM_RESTART_COUNT; while :; do sleep 0.2; done'
    low = submit(cluster, script, "--nodes=3", "--signal=B:USR1@60", "--requeue", "--open-mode=append")
    cluster.wait(low, lambda job: job["JobState"] == "RUNNING" and "start" in output(cluster, low))
    high = submit(cluster, "sleep 1", "--partition=high", "--nodes=3", "--exclusive")
    cluster.wait(high, "COMPLETED", LOST_SECONDS)
    cluster.wait(low, lambda job: job["Restarts"] == "1" and "start 1" in output(cluster, low), LOST_SECONDS)
    lines = [line for line in output(cluster, low).splitlines() if line.startswith(("start", "got"))]
    assert lines == ["start", "got USR1", "start 1"]


def test_the_job_of_a_killed_node_is_requeued_on_other_nodes(cluster):
    job_id = submit(cluster, "env -i sleep 1000 & srun sleep 1000", "--nodes=2", "--exclusive")
    cluster.wait(job_id, "RUNNING")
    wait_for_programs(cluster, "n1", "sleep", 2)
    wait_for_programs(cluster, "n2", "sleep", 1)
    cluster.kill_node("n1")
    assert cluster._job_processes("n1") == [] and cluster._step_daemons("n1") == []
    # The job's processes on n2 may have ended with the job's srun, which was on the lost node.
    assert "slurmd" in node_processes(cluster._mark("n2")).values(), "the other node lost processes too"
    job = cluster.wait(job_id, lambda job: job["Restarts"] == "1" and job["JobState"] == "RUNNING", LOST_SECONDS)
    assert job["NodeList"] == "n[2-3]"
    assert cluster.node_states()["n1"] == "DOWN+NOT_RESPONDING"
    cluster.restart_node("n1")
    deadline = time.monotonic() + LOST_SECONDS
    while cluster.node_states()["n1"] != "IDLE":
        assert time.monotonic() < deadline, cluster.node_states()
        time.sleep(0.2)


def test_processes_continue_if_only_the_network_is_lost(cluster):
    beat = cluster.folder / "work" / "beat"
    job_id = submit(cluster, f"srun bash -c 'while sleep 0.2; do date +%N >{beat}.$SLURMD_NODENAME; echo $SECONDS; done'")
    cluster.wait(job_id, lambda job: job["JobState"] == "RUNNING" and Path(f"{beat}.n1").exists())
    # This job ends while SLURM cannot reach its node.
    unheard = submit(cluster, f"while [ ! -e {beat}.end ]; do sleep 0.1; done", "--nodelist=n1")
    cluster.wait(unheard, "RUNNING")
    before = set(wait_for_programs(cluster, "n1", "bash", 1))
    assert len(wait_for_programs(cluster, "n1", "slurm_script", 2)) == 2
    cluster.kill_node("n1", processes_too=False)
    Path(f"{beat}.end").touch()
    time.sleep(2)
    assert len(wait_for_programs(cluster, "n1", "slurm_script", 1)) == 1
    assert cluster.job(unheard)["JobState"] == "RUNNING"
    job = cluster.wait(job_id, lambda job: job["Restarts"] == "1" and job["JobState"] == "RUNNING", LOST_SECONDS)
    assert job["BatchHost"] == "n2"
    assert cluster.node_states()["n1"] == "DOWN+NOT_RESPONDING"
    last = Path(f"{beat}.n1").read_text()
    time.sleep(1)
    assert Path(f"{beat}.n1").read_text() != last, "the lost node's process stopped working"
    assert before <= set(cluster._job_processes("n1"))
    # After the network returns, SLURM ends the processes of the requeued job.
    cluster.restart_node("n1")
    deadline = time.monotonic() + LOST_SECONDS
    while cluster._job_processes("n1"):
        assert time.monotonic() < deadline, cluster.node_states()
        time.sleep(0.2)


def test_heal_ends_jobs_and_repairs_nodes_and_folders(cluster):
    stubborn = submit(cluster, "trap '' TERM CONT; while :; do sleep 1; done", "--nodes=2")
    waiting = submit(cluster, "true", "--begin=now+1hour")
    cluster.wait(stubborn, "RUNNING")
    cluster.kill_node("n3")
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    shutil.rmtree(cluster.temporary_folder("n1"))
    cluster.temporary_folder("n1").write_text("a file")
    (cluster.temporary_folder("n2") / "rest").write_text("left over")
    cluster.heal()
    assert set(cluster.node_states().values()) == {"IDLE"}
    assert [cluster.job(job_id)["JobState"] for job_id in (stubborn, waiting)] == ["CANCELLED", "CANCELLED"]
    assert [list(cluster.temporary_folder(node).iterdir()) for node in cluster.nodes] == [[], [], []]


def test_two_clusters_run_side_by_side_and_one_ends_without_a_trace(cluster):
    mine = submit(cluster, "sleep 1000", "--nodes=3")
    cluster.wait(mine, "RUNNING")
    wait_for_programs(cluster, "n1", "slurm_script", 1)
    # The other cluster has the same node names. `stranger` is an unrelated process that resembles a job's process.
    with SlurmCluster(nodes=2) as other:
        stranger = subprocess.Popen(["sleep", "1000"], env={**os.environ, "SLURMD_NODENAME": "n1", NODE_MARK: "elsewhere/n1"})
        theirs = submit(other, "srun setsid sleep 1000", "--nodes=2")
        other.wait(theirs, "RUNNING")
        wait_for_programs(other, "n2", "sleep", 1)
        assert mine == cluster.job(mine)["JobId"] and len(other.jobs()) == 1
        assert set(other.node_states()) == {"n1", "n2"}
        kept = set(cluster._job_processes("n1"))
        other.kill_node("n1")
        folder = other.folder
        assert traces_of(folder)
    try:
        assert not folder.exists() and traces_of(folder) == []
        assert stranger.poll() is None, "a process outside the cluster was ended"
        assert kept and kept <= set(cluster._job_processes("n1"))
        assert cluster.job(mine)["JobState"] == "RUNNING"
        assert set(cluster.node_states().values()) <= {"ALLOCATED", "MIXED"}
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.usefixtures("cluster")
def test_daemons_end_with_the_process_that_started_them():
    """A test run that is killed cannot close its cluster."""
    script = (
        "import time; from tests.support.slurm.cluster import SlurmCluster as C; "
        "print(C(nodes=1).folder, flush=True); time.sleep(600)"
    )
    python = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert python.stdout is not None
    folder = Path(python.stdout.readline().strip())
    try:
        assert {"munged", "slurmctld", "slurmd"} <= {trace.split()[1].split("\0")[0] for trace in traces_of(folder)}
    finally:
        python.kill()
        python.communicate()
    deadline = time.monotonic() + 10
    while traces_of(folder):
        assert time.monotonic() < deadline, traces_of(folder)
        time.sleep(0.1)
    shutil.rmtree(folder)


def wait_for_programs(cluster: SlurmCluster, node: str, program: str, count: int) -> list[int]:
    """Wait until `count` job processes on a node run a program, and return their ids."""
    deadline = time.monotonic() + 20
    while True:
        wanted = set(cluster._job_processes(node))
        found = [pid for pid, _, name in process_table() if pid in wanted and name == program]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, f"{node} runs {len(found)} {program}, not {count}"
        time.sleep(0.1)
