"""Watchdog functions on a single process, without a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from infini_train.config import HealthConfig, RunConfig
from infini_train.resilience.watchdog import STACK_SIGNAL, Watchdog, _describe, _dump_silent_process, _process_state

PROGRAM = """
import faulthandler, sys, time
file = open(sys.argv[1], "w")
faulthandler.register(int(sys.argv[2]), file=file)
def sleeper():
    print("ready", flush=True)
    time.sleep(600)
sleeper()
"""


def test_stopped_process_dumps_its_stacks_and_is_stopped_again(tmp_path):
    path = tmp_path / "rank_0.txt"
    command = [sys.executable, "-c", PROGRAM, str(path), str(int(STACK_SIGNAL))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            _dump_silent_process(process.pid, path)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            assert "in sleeper" in path.read_text(encoding="utf-8")
            assert _process_state(process.pid) == "T"
        finally:
            process.kill()


def test_rank_that_left_unseen_becomes_overdue_and_is_named(tmp_path):
    watchdog = Watchdog(RunConfig(health=HealthConfig(first_step_seconds=1800.0)))
    watchdog._rank, watchdog._folder = 0, tmp_path
    watchdog._read_heartbeat(1)
    seen = watchdog._seen[1]
    assert not seen.overdue
    seen.at -= 1801.0
    watchdog._read_heartbeat(1)
    assert watchdog._seen[1].overdue
    assert "rank 1 (host unknown" in _describe({**seen.beat, "silent": True, "seconds": seen.seconds})
