"""The lock of a run directory, with real processes that hold it, stop and die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infini_train.config import RunConfig
from infini_train.resilience import run_lock
from infini_train.resilience.run_lock import RunDirectoryLock
from infini_train.runtime.errors import UserError

HOLD = """
import sys, time
from infini_train.config import RunConfig
from infini_train.resilience.run_lock import RunDirectoryLock
RunDirectoryLock(RunConfig(run_dir=sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def acquire(folder: Path) -> RunDirectoryLock:
    lock = RunDirectoryLock(RunConfig(run_dir=str(folder)))
    lock.acquire()
    return lock


def change(folder: Path, **values: object) -> None:
    path = folder / "lock.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_second_job_is_refused_until_the_first_is_dead(holder, tmp_path):
    with pytest.raises(UserError, match=rf"in use by another job \(host \S+, pid {holder.pid}\)"):
        acquire(tmp_path)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="in use"):
        acquire(tmp_path)
    holder.kill()
    holder.wait()
    started = time.monotonic()
    acquire(tmp_path).check_held()
    assert time.monotonic() - started < run_lock.SILENT_SECONDS / 2, "a dead process on this machine must be detected at once"


def test_zombie_process_counts_as_dead(holder, tmp_path):
    """In a container without an init process, the ranks of a killed launcher stay zombies."""
    holder.kill()
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    acquire(tmp_path).check_held()


def test_requeued_slurm_job_takes_over_and_the_earlier_start_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = acquire(tmp_path)
    with pytest.raises(UserError, match="SLURM job 7"):
        acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = acquire(tmp_path)
    second.check_held()
    with pytest.raises(UserError, match="has taken over"):
        first.check_held()
    first.__exit__()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == second.content["token"], "first released a foreign lock"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="in use by SLURM job 7"):
        acquire(tmp_path)


def test_job_on_another_machine_is_alive_while_its_heartbeat_advances(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 1.5)
    acquire(tmp_path)
    change(tmp_path, machine="elsewhere", host="far", pid=os.getpid())

    def beat() -> None:
        time.sleep(0.5)
        change(tmp_path, beat=1)

    other = threading.Thread(target=beat)
    other.start()
    with pytest.raises(UserError, match="host far"):
        acquire(tmp_path)
    other.join()
    started = time.monotonic()
    acquire(tmp_path).check_held()
    assert time.monotonic() - started > 1.4, "the heartbeat was not watched for long enough"


def test_lock_heartbeat_advances_and_lock_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunDirectoryLock(RunConfig(run_dir=str(tmp_path))) as lock:
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "lock.json").read_text())["beat"] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / "lock.json").read_text())["beat"] >= 2
        lock.check_held()
    assert list(tmp_path.iterdir()) == []


def test_deleted_lock_file_does_not_stop_the_job(tmp_path):
    lock = acquire(tmp_path)
    (tmp_path / "lock.json").unlink()
    lock.check_held()
