"""Stop signals at a launcher before the first step: the messages, and the exit code of a run that saved nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infini_train.runtime.signals import STOP_SIGNALS
from tests.distributed.test_checkpoint import finish
from tests.support.distributed.command import REPOSITORY
from tests.support.free_port import free_port

HELD = """
import os, pathlib, signal, sys, time

if "infini_train" in sys.orig_argv:
    if {where} != ("--check_only" in sys.orig_argv):
        os._exit(0)  # the check succeeds
    if {catches}:
        signal.signal(signal.SIGTERM, lambda *_: None)
    pathlib.Path({folder!r}, "held" + os.environ.get("RANK", "")).touch()
    time.sleep(100)
"""
SAVED_NOTHING = "launch: stopped before a step was done; nothing new was saved: start the same command again\n"


def start(folder: Path, *arguments: str, check: bool = False, catches: str = "False") -> subprocess.Popen[str]:
    """Start a launcher whose configuration check, or else whose ranks, block at the start of the interpreter.

    Args:
        check: whether the configuration check blocks; otherwise the ranks block.
        catches: Python condition under which a rank ignores SIGTERM, like a rank that waits for another one.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HELD.format(where=check, catches=catches, folder=str(folder)), encoding="utf-8")
    script, *rest = arguments
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "launch" / script), *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}"},
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_while_the_configuration_is_checked(number, tmp_path):
    process = start(tmp_path / "held", "local.py", "2", "pretrain", check=True)
    wait_until((tmp_path / "held" / "held").exists)
    # Signal all foreground processes, as a terminal does.
    os.killpg(process.pid, number)
    assert finish(process, 128 + number) == SAVED_NOTHING


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("catches", ["False", "os.environ['RANK'] == '0'"], ids=["none waits", "one waits"])
def test_a_stop_while_the_ranks_start(number, catches, tmp_path):
    process = start(tmp_path / "held", "local.py", "2", "pretrain", catches=catches)
    wait_until(lambda: all((tmp_path / "held" / f"held{rank}").exists() for rank in (0, 1)))
    began = time.monotonic()
    os.killpg(process.pid, number)
    output = finish(process, 128 + number)
    assert time.monotonic() - began < 15
    begun, _, stopping, stopped = output.splitlines(keepends=True)
    assert begun == "launch: starting 2 processes\n" and stopped == SAVED_NOTHING
    assert "or at once if the processes are still starting" in stopping


def test_the_message_of_a_command_without_checkpoints_mentions_none(tmp_path):
    process = start(tmp_path / "held", "local.py", "1", "generate")
    wait_until((tmp_path / "held" / "held0").exists)
    process.send_signal(signal.SIGINT)
    assert finish(process, 130) == (
        "launch: starting 1 process\n\nstopping; signal again to stop at once\n"
        "launch: stopped before generate was done: start the same command again\n"
    )


def test_two_hosts_end_with_the_exit_code_of_the_signal(tmp_path):
    port = free_port()
    hosts = [
        start(
            tmp_path / f"held{host}",
            *("multinode.py", "--hosts", "127.0.0.1,127.0.0.2", "--processes_per_host", "1", "--port", str(port)),
            *("--node_rank", str(host), "generate"),
        )
        for host in (0, 1)
    ]
    wait_until(lambda: all((tmp_path / f"held{rank}" / f"held{rank}").exists() for rank in (0, 1)))
    hosts[1].send_signal(signal.SIGINT)
    outputs = [finish(host, 130) for host in hosts]
    assert all("launch: rank 1 was asked to stop before" in output for output in outputs), outputs
    assert "launch: stopped before generate was done" in outputs[1] and "launch: stopped" not in outputs[0]


def test_a_host_that_waits_for_another_is_stopped_in_one_line(tmp_path):
    port = free_port()
    process = start(
        tmp_path / "held",
        *("multinode.py", "--hosts", "127.0.0.1,127.0.0.2", "--processes_per_host", "1", "--port", str(port)),
        *("--node_rank", "0", "generate"),
    )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens)
    process.send_signal(signal.SIGINT)
    assert finish(process, 130) == "launch: stopped before generate was done: start the same command again\n"


def test_a_signal_after_the_work_does_not_change_the_exit_code(tmp_path):
    """Python's exit takes a moment after torch was used. A launcher's signal must not change the exit code then."""
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGTERM)"
    (tmp_path / "sitecustomize.py").write_text(late, encoding="utf-8")
    command = [sys.executable, "-m", "infini_train", "checkpoint", "list", "--run_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2
