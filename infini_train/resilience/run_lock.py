"""Lock of a run directory: only one job may use it.

Two jobs in one run directory would mix their metrics and checkpoints. Rank 0 of a job writes `lock.json` to the run directory.
It contains a token of the job and a heartbeat, a counter that a thread increments. A later job decides whether the lock's owner
is alive:

- On the same machine, it checks the owner's process.
- On another machine, it watches whether the heartbeat advances, because clocks of two machines cannot be compared.
- It takes over the lock of an earlier start of the same, requeued SLURM job, even if a lost node still computes.

A job whose lock was taken over finds another token in the file, and stops before it writes anything more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infini_train.config import RunConfig
from infini_train.parallel.layout import initialize_process_group, raise_everywhere
from infini_train.runtime.errors import UserError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""A job on another machine counts as dead after so long without a new heartbeat."""


def process_start(pid: int) -> str:
    """Return the start time of a process on this machine in kernel ticks; empty if it does not exist or is a zombie."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[18] if state not in "ZX" else ""
    return ""


def machine() -> str:
    """Identify the scope in which a pid is unique: this boot of this machine, and the pid namespace."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


class RunDirectoryLock:
    """Context manager that holds the lock of the run directory. Entering it is a collective over all ranks.

    Raises:
        UserError: another job is alive in the run directory.
    """

    def __init__(self, run: RunConfig) -> None:
        self.path = Path(run.run_dir) / "lock.json"
        self._timeout = run.collective_timeout_seconds
        self.content: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "beat": 0,
        }
        self.held = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._update_heartbeat, name="run lock", daemon=True)

    def __enter__(self) -> RunDirectoryLock:
        initialize_process_group(self._timeout)
        error = None
        if dist.get_rank() == 0:
            try:
                self.acquire()
            except UserError as refused:
                error = refused
        raise_everywhere(error)
        if self.held:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.held and self._read().get("token") == self.content["token"]:
            self.path.unlink(missing_ok=True)

    def check_held(self) -> None:
        """Check on rank 0 that it still holds the lock; do nothing on other ranks.

        Raises:
            UserError: another job has taken the run directory over.
        """
        if not self.held:
            return
        found = self._read()
        if found.get("token") not in (None, self.content["token"]):
            raise UserError(f"{self._describe(found)} has taken over run_dir {self.path.parent}; this one writes nothing more")

    def acquire(self) -> None:
        """Take the lock; replace the lock of a dead job.

        Raises:
            UserError: another job is alive, or the run directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._create():
                found = self._read()
                if not self._is_gone(found):
                    raise UserError(
                        f"run_dir {self.path.parent} is in use by {self._describe(found)}; wait until it ends or stop it, or "
                        "give this run another run_dir"
                    )
                self._write()
                # If two jobs find the same dead job, the one that writes last gets the lock.
                time.sleep(0.2)
                found = self._read()
                if found.get("token") != self.content["token"]:
                    raise UserError(f"run_dir {self.path.parent} was taken by {self._describe(found)} at the same time")
        except OSError as error:
            raise UserError(f"run_dir {self.path.parent} cannot be written: {error.strerror or error}") from error
        self.held = True

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.content, file)
        return True

    def _is_gone(self, found: dict[str, Any]) -> bool:
        mine = self.content
        same_slurm_job = found.get("slurm_job") is not None and found["slurm_job"] == mine["slurm_job"]
        if same_slurm_job and found["slurm_restart"] < mine["slurm_restart"]:
            return True
        if found.get("machine") == mine["machine"]:
            return process_start(found["pid"]) != found["process_start"]
        # Watch an empty file too: it is being written, or its writer died while writing.
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)
            now = self._read()
            if (now.get("token"), now.get("beat")) != (found.get("token"), found.get("beat")):
                return False
        return True

    def _update_heartbeat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # A file system that fails for a while must not end a run.
            with suppress(OSError):
                if self._read().get("token") not in (None, self.content["token"]):
                    return
                self.content["beat"] += 1
                self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".lock-{self.content['token']}")
        temporary.write_text(json.dumps(self.content), encoding="utf-8")
        temporary.replace(self.path)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _describe(self, found: dict[str, Any]) -> str:
        job = f"SLURM job {found['slurm_job']} " if found.get("slurm_job") else "another job "
        return f"{job}(host {found.get('host', 'unknown')}, pid {found.get('pid', 'unknown')})"
