"""Two launchers on one machine, as two hosts (127.0.0.1 and 127.0.0.2), compared with the launcher of one host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.config import CheckpointConfig, LayoutConfig, RunConfig, save_config
from infini_train.data.preparation import prepare
from tests.distributed.test_checkpoint import finish, metrics, start, wait_for_step
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.command import REPOSITORY
from tests.support.free_port import free_port
from tests.support.warm.interpreter import launcher

HOSTS = ["127.0.0.1", "127.0.0.2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder / "text")
    run = small_run(folder)
    run = replace(
        run,
        layout=LayoutConfig(pipeline_parallel_size=2, zero_stage=1),
        training=replace(run.training, steps=24, self_test=False),
        checkpoint=CheckpointConfig(every=100),
    )
    prepare(run)
    return run


def launch(host: int, port: int, *command: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    arguments = ["--hosts", ",".join(HOSTS), "--processes_per_host", "1", "--port", str(port), "--node_rank", str(host)]
    return subprocess.Popen(
        [*launcher(REPOSITORY / "launch" / "multinode.py"), *arguments, *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def on_two_hosts(run: RunConfig) -> list[subprocess.Popen[str]]:
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    config = Path(run.run_dir).with_suffix(".yaml")
    save_config(run, config)
    port = free_port()
    # Start the second host first; it waits for the first.
    return [launch(host, port, "pretrain", "--config", str(config)) for host in (1, 0)][::-1]


def test_two_hosts_stop_resume_and_match_one_host(run):
    alone = replace(run, run_dir=run.run_dir + " alone")
    finish(start(alone, 2), 0)
    both = replace(run, run_dir=run.run_dir + " both")
    hosts = on_two_hosts(both)
    wait_for_step(both, 2, hosts[0])
    hosts[1].send_signal(signal.SIGTERM)
    outputs = [finish(host, 85) for host in hosts]
    assert "stopping after the step, with a checkpoint" in outputs[1] and "stopping after" not in outputs[0]
    assert 2 <= len(metrics(both)) < 24
    outputs = [finish(host, 0) for host in on_two_hosts(both)]
    assert "trained to step 24" in outputs[0]
    assert metrics(both) == metrics(alone)


def test_a_killed_rank_ends_both_hosts(run):
    hit = replace(run, run_dir=run.run_dir + " killed")
    hosts = on_two_hosts(hit)
    wait_for_step(hit, 2, hosts[0])
    (rank,) = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)
    began = time.monotonic()
    outputs = [finish(host, 128 + 9) for host in hosts]
    assert time.monotonic() - began < 40.0
    assert all("launch: rank 1 was killed by signal 9 on 127.0.0.2\n" in output for output in outputs), outputs


def test_a_lost_launcher_ends_both_hosts(run):
    hit = replace(run, run_dir=run.run_dir + " lost")
    hosts = on_two_hosts(hit)
    wait_for_step(hit, 2, hosts[0])
    (rank,) = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
    hosts[1].kill()
    assert "launch: the launcher on 127.0.0.2 is gone\n" in finish(hosts[0], 1)
    # The ranks of the lost launcher learn of the end from the other ranks. They are not children of this process, so poll for
    # their end.
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{rank}").exists()


def test_a_configuration_error_is_one_line_on_each_host(run, tmp_path):
    save_config(replace(run, layout=LayoutConfig(pipeline_parallel_size=3)), tmp_path / "wrong.yaml")
    hosts = [launch(host, 1, "pretrain", "--config", str(tmp_path / "wrong.yaml")) for host in (0, 1)]
    for host in hosts:
        output = finish(host, 2)
        assert len(output.splitlines()) == 1 and "layout.pipeline_parallel_size" in output, output


def test_different_commands_on_two_hosts_are_reported():
    port = free_port()
    hosts = [launch(0, port, "evaluate"), launch(1, port, "generate")]
    for host in hosts:
        output = finish(host, 1)
        assert "127.0.0.2 was started with the command ['generate'], and 127.0.0.1 with ['evaluate']" in output


def test_a_command_for_one_process_is_refused():
    for host in (0, 1):
        assert "prepare is for one process: call infini-train prepare without" in finish(
            launch(host, free_port(), "prepare"), 2
        )


def test_a_host_that_does_not_connect_is_named():
    assert "127.0.0.2 did not connect to 127.0.0.1" in finish(
        launch(0, free_port(), "generate", options=("--meet_seconds", "1")), 1
    )
    port = free_port()
    output = finish(launch(1, port, "generate", options=("--meet_seconds", "1")), 1)
    assert f"127.0.0.1, port {port}, did not answer within 1 s" in output


def test_wrong_usage_is_one_line_before_hosts_connect(tmp_path):
    for options, words in (
        (("--hosts", "127.0.0.1,127.0.0.2"), "several are this machine"),
        (("--hosts", "198.51.100.1,198.51.100.2"), "none is this machine: 198.51.100.1 is 198.51.100.1"),
        (("--hosts", "127.0.0.1,127.0.0.1"), "twice"),
        (("--hosts", "127.0.0.1", "--node_rank", "1"), "--node_rank is 1"),
        (("--hosts", "127.0.0.1", "--preset", "infinband"), "known are efa, infiniband, single_node"),
        (("--hosts", "no-such-host.invalid"), "'no-such-host.invalid' has no address"),
    ):
        result = subprocess.run(
            [sys.executable, str(REPOSITORY / "launch/multinode.py"), *options, "--processes_per_host", "1", "report"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr


def test_the_preflight_runs_on_listed_hosts_with_a_preset(tmp_path):
    port = free_port()
    command = ("preflight", "--folder", str(tmp_path / "run"))
    hosts = [
        launch(
            host,
            port,
            *command,
            options=("--preset", "single_node"),
            SLURMD_NODENAME=f"node{host}",
            NCCL_DEBUG="INFO",
        )
        for host in (0, 1)
    ]
    outputs = [finish(host, 0) for host in hosts]
    assert "node1" in outputs[0] and "fine" in outputs[0]
    assert all("launch: NCCL_DEBUG is 'INFO', as set here, and not 'WARN' as in single_node" in output for output in outputs)
