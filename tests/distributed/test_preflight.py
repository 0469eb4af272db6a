"""The preflight with real gloo processes, one per node: it names a bad node, and all ranks return the same exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed.command import REPOSITORY
from tests.support.free_port import free_port
from tests.support.warm.interpreter import python

PREFLIGHT = str(REPOSITORY / "launch" / "preflight.py")


@dataclass
class Outcome:
    codes: list[int | None]
    """Exit codes by rank; None for a rank that the test killed."""
    output: list[str]
    verdict: dict[str, Any] | None
    bad_nodes: list[str]


def preflight(folder: Path, *options: str, nodes: int = 3, fault: str = "none", at: int = -1, **environment: str) -> Outcome:
    """Run the preflight with one rank on each of several nodes (node0, node1 and so on), with a fault on one of them.

    Args:
        fault: name of the fault, see `preflight_fault`.
        at: rank with the fault.
        environment: additional variables of the rank with the fault.
    """
    port = free_port()
    ranks = []
    for rank in range(nodes):
        temp = folder / f"temp{rank}"
        temp.mkdir()
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(nodes),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SLURMD_NODENAME": f"node{rank}",
            "TMPDIR": str(temp),
            **(environment if rank == at else {}),
        }
        program = ["-m", "tests.support.distributed.preflight_fault", fault] if rank == at else [PREFLIGHT]
        ranks.append(
            subprocess.Popen(
                [python(), *program, "--folder", str(folder / "run"), *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables,
                cwd=REPOSITORY,
            )
        )
    outputs, codes = [""] * nodes, [None] * nodes
    try:
        for rank, process in enumerate(ranks):
            if not (rank == at and "hang" in fault):
                outputs[rank] = process.communicate(timeout=90)[0]
                codes[rank] = process.returncode
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    job = folder / "run" / "job"
    verdict = json.loads((job / "preflight.json").read_text()) if (job / "preflight.json").exists() else None
    bad = (job / "bad_nodes").read_text().splitlines() if (job / "bad_nodes").exists() else []
    assert not list(job.glob(".*")) or at == 0, "a temporary file was not deleted"
    assert not (folder / "run").exists() or [path.name for path in (folder / "run").iterdir()] == ["job"]
    return Outcome(codes, outputs, verdict, bad)


def problems(outcome: Outcome) -> dict[str, dict[str, str]]:
    return {node["name"]: node["problems"] for node in outcome.verdict["nodes"] if node["problems"]}


def test_good_nodes(tmp_path):
    (tmp_path / "run" / "job").mkdir(parents=True)
    (tmp_path / "run" / "job" / "bad_nodes").write_text("of_an_earlier_start\n")
    outcome = preflight(tmp_path)
    assert outcome.codes == [0, 0, 0], outcome.output
    assert outcome.bad_nodes == [] and problems(outcome) == {} and outcome.verdict["general"] == []
    assert outcome.verdict["bandwidth"] > 0
    for rank, node in enumerate(outcome.verdict["nodes"]):
        assert (node["name"], node["ranks"]) == (f"node{rank}", [rank])
        assert "GiB free" in node["checks"]["folder"] and "GiB free" in node["checks"]["temp"]
        assert abs(float(node["checks"]["clock"].removesuffix(" s"))) < 1.0
    table = outcome.output[0].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["node", "node0", "node1", "node2"]
    assert outcome.output[1:] == ["", ""], "a rank other than 0 printed"


@pytest.mark.parametrize("at", [0, 2])
def test_a_node_whose_temporary_folder_is_a_file(at, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = preflight(tmp_path, at=at, TMPDIR=str(tmp_path / "file"))
    assert outcome.codes == [3, 3, 3], outcome.output
    assert outcome.bad_nodes == [f"node{at}"] and list(problems(outcome)[f"node{at}"]) == ["temp"]
    assert outcome.verdict["bandwidth"] > 0, "the bandwidth was not measured"


@pytest.mark.parametrize("at", [0, 1])
def test_a_clock_that_is_off(at, tmp_path):
    outcome = preflight(tmp_path, fault="clock", at=at)
    assert outcome.codes == [3, 3, 3], outcome.output
    assert outcome.bad_nodes == [f"node{at}"] and list(problems(outcome)[f"node{at}"]) == ["clock"]


def test_a_rank_that_hangs_in_its_own_checks(tmp_path):
    outcome = preflight(tmp_path, "--timeout_seconds=10", nodes=2, fault="hang_in_checks", at=1)
    assert outcome.codes == [3, None], outcome.output
    assert outcome.bad_nodes == ["node1"] and "did not answer" in problems(outcome)["node1"]["answer"]


def test_a_rank_that_hangs_while_nodes_are_measured(tmp_path):
    outcome = preflight(tmp_path, "--timeout_seconds=10", nodes=2, fault="hang_in_all_reduce", at=1)
    assert outcome.codes == [3, None], outcome.output
    assert outcome.bad_nodes == ["node1"] and "stopped responding" in problems(outcome)["node1"]["answer"]


@pytest.mark.parametrize("at,names", [(1, ["node1"]), (0, ["node0"])])
def test_the_name_of_a_node_that_never_connects_comes_from_slurm(at, names, tmp_path):
    """A stub of scontrol lists the nodes of the job."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf "node0\\nnode1\\n"\n')
    scontrol.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
        outcome = preflight(tmp_path, "--timeout_seconds=10", nodes=2, fault="hang_at_start", at=at)
    assert [code for rank, code in enumerate(outcome.codes) if rank != at] == [3], outcome.output
    assert outcome.bad_nodes == names


def test_a_bandwidth_that_no_node_reaches_is_a_general_problem(tmp_path):
    outcome = preflight(tmp_path, "--minimum_gigabytes_per_second=1e6")
    assert outcome.codes == [4, 4, 4], outcome.output
    assert outcome.bad_nodes == []
    (problem,) = outcome.verdict["general"]
    assert "no single node is the cause" in problem and problem in outcome.output[0]
    assert all("GB/s with node" in node["checks"]["bandwidth"] for node in outcome.verdict["nodes"])


def test_a_slow_node_is_found_by_pairs(tmp_path):
    outcome = preflight(tmp_path, "--minimum_gigabytes_per_second=0.05", fault="slow", at=2)
    assert outcome.codes == [3, 3, 3], outcome.output
    assert outcome.bad_nodes == ["node2"] and list(problems(outcome)["node2"]) == ["bandwidth"]


@pytest.mark.parametrize(
    "option,words",
    [
        ("--timeout_seconds=0", "--timeout_seconds"),
        ("--gpus_per_node=-1", "--gpus_per_node"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_wrong_usage_is_reported_before_the_preflight_starts(option, words, tmp_path):
    outcome = preflight(tmp_path, option, nodes=1)
    assert outcome.codes == [2] and words in outcome.output[0] and outcome.verdict is None


def test_wrong_usage_is_reported_without_importing_torch(tmp_path):
    """A missing environment variable is reported at once, without the seconds that importing torch takes."""
    script = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", script, PREFLIGHT, "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RANK"},
        check=False,
    )
    assert result.returncode == 2 and "RANK is ''" in result.stderr
