"""Watchdog: end a job in which no rank makes progress, and name the rank that blocks the others.

A watchdog thread of every rank writes heartbeats to a file in the run directory and reads the file of the next rank. A
heartbeat names the operation in progress. Files are used because a store that one rank serves would stop with that rank. A rank
is overdue if its operation takes longer than its time limit. The job hangs if all ranks are overdue. Durations are measured on
one clock at a time, the writer's or the reader's, because clocks of two machines cannot be compared.

The watchdog blames the ranks whose heartbeats have stopped too: the process is stopped, or its machine is lost. If there are
none, it blames the ranks whose operation does not wait for others. If there are none either, it blames all ranks.

The thread that detects the hang writes a verdict. Each thread that reads it dumps the stacks of its process to
stacks/rank_N.txt and ends the process with HANG_EXIT_CODE. A stopped process cannot do so: another one continues it briefly to
dump its stacks, and stops it again. The launcher then kills it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infini_train.config import RunConfig
from infini_train.parallel.layout import initialize_process_group, raise_everywhere
from infini_train.runtime.activity import Activity
from infini_train.runtime.errors import UserError

HANG_EXIT_CODE = 86
"""Exit code of a job that the watchdog ended; it resumes from the newest checkpoint when started again."""
STACK_SIGNAL = signal.SIGUSR2
SILENT_BEATS = 4
"""A rank is silent after so many missed heartbeats."""


@dataclass
class Seen:
    """The newest heartbeat of a rank, and the time at which this process first saw it."""

    beat: dict[str, Any]
    at: float

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self.at

    @property
    def seconds(self) -> float:
        """Time in the current operation: the time in the heartbeat, and the time since this process saw it."""
        return float(self.beat["seconds"]) + self.silent_seconds

    @property
    def overdue(self) -> bool:
        return self.seconds > self.beat["limit"]


class Watchdog:
    """Context manager that watches the job until the block ends. Entering it is a collective over all ranks.

    Attributes:
        activity: the operation in progress on this rank; the training code keeps it up to date.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.activity = Activity("starting")
        self._limits = {
            "first_step": run.health.first_step_seconds,
            "step": run.health.hang_seconds,
            "save": run.health.save_seconds,
        }
        self._interval = min(5.0, run.health.hang_seconds / 10)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._seen: dict[int, Seen] = {}
        self._beats = 0
        self._beating = threading.Lock()

    def __enter__(self) -> Watchdog:
        if self.run.health.hang_seconds == 0:
            return self
        initialize_process_group()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        run_dir = Path(self.run.run_dir)
        # A unique name for each start: processes of an earlier start may still be running.
        name = [f"heartbeats-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"]
        dist.broadcast_object_list(name, src=0)
        self._folder, self._stacks = run_dir / name[0], run_dir / "stacks"
        error = None
        if self._rank == 0:
            for old in [*run_dir.glob("heartbeats-*"), self._stacks]:
                shutil.rmtree(old, ignore_errors=True)
            try:
                self._folder.mkdir(parents=True)
                self._stacks.mkdir(exist_ok=True)
            except OSError as failure:
                error = UserError(f"run_dir {run_dir} cannot be written: {failure.strerror or failure}")
        raise_everywhere(error)
        self._stack_file = (self._stacks / f"rank_{self._rank}.txt").open("w", encoding="utf-8")
        faulthandler.register(STACK_SIGNAL, file=self._stack_file, all_threads=True)
        self._try_heartbeat()
        # Write a heartbeat when the limit changes: a rank that stops right after a save must not get the time limit of a save.
        self.activity.on_limit = self._try_heartbeat
        dist.barrier()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._thread.is_alive():
            return
        self.activity.on_limit = lambda: None
        if kind is not None and (self._folder / "verdict.json").exists():
            # The watchdog has ended other ranks, so communication with them failed here. Let the watchdog end this rank too.
            self._thread.join()
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(STACK_SIGNAL)
        self._stack_file.close()
        # Each rank deletes its own files, and the last rank the folders: others may still write heartbeats.
        for file in (self._folder / f"rank_{self._rank}.json", self._stacks / f"rank_{self._rank}.txt"):
            with suppress(OSError):
                file.unlink()
            with suppress(OSError):
                file.parent.rmdir()

    def _watch(self) -> None:
        suspicious = 0
        while not self._ended.wait(self._interval):
            try:
                self._record_heartbeat()
                self._read_heartbeat((self._rank + 1) % self._world_size)
                if (self._folder / "verdict.json").exists():
                    self._end_process(json.loads((self._folder / "verdict.json").read_text(encoding="utf-8")))
                if any(self._seen[rank].overdue for rank in (self._rank, (self._rank + 1) % self._world_size)):
                    suspicious += 1
                    for rank in range(self._world_size):
                        self._read_heartbeat(rank)
                    # A rank counts as silent only after several missed heartbeats, so wait for that long.
                    if suspicious > SILENT_BEATS and all(seen.overdue for seen in self._seen.values()):
                        self._write_verdict()
                else:
                    suspicious = 0
            except (OSError, ValueError, KeyError):
                # A temporary file system error must not end a run, nor must a folder that another rank has deleted.
                continue

    def _try_heartbeat(self) -> None:
        # A file system error must not end the run; the next heartbeat tries again.
        with suppress(OSError):
            self._record_heartbeat()

    def _record_heartbeat(self) -> None:
        operation, waits, seconds = self.activity.now()
        if self.activity.step:
            operation += f" in step {self.activity.step}"
        with self._beating:
            self._write_heartbeat(operation, waits, seconds)

    def _write_heartbeat(self, operation: str, waits: bool, seconds: float) -> None:
        self._beats += 1
        beat = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": self._beats,
            "operation": operation,
            "waits": waits,
            "seconds": seconds,
            "limit": self._limits[self.activity.limit],
        }
        path = self._folder / f"rank_{self._rank}.json"
        path.with_suffix(".new").write_text(json.dumps(beat), encoding="utf-8")
        os.replace(path.with_suffix(".new"), path)
        self._seen[self._rank] = Seen(beat, time.monotonic())

    def _read_heartbeat(self, rank: int) -> None:
        if rank == self._rank:
            return
        try:
            beat = json.loads((self._folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            # The rank has left the run. If the run is not over, the others may wait for it forever, so keep its last heartbeat,
            # which becomes overdue. Use the limit of a step: its last heartbeat may have the longer limit of the first step.
            last = self._seen.get(rank) or Seen(self._missing_heartbeat(rank), time.monotonic())
            self._seen[rank] = Seen({**last.beat, "limit": self._limits["step"]}, last.at)
            return
        if rank not in self._seen or self._seen[rank].beat["beats"] != beat["beats"]:
            self._seen[rank] = Seen(beat, time.monotonic())

    def _missing_heartbeat(self, rank: int) -> dict[str, Any]:
        """Return a placeholder for the heartbeat of a rank that left before one was seen."""
        return {
            "rank": rank,
            "host": "unknown",
            "pid": 0,
            "beats": -1,
            "operation": "a run that it has left",
            "waits": False,
            "seconds": 0.0,
        }

    def _write_verdict(self) -> None:
        """Write the verdict and print the blamed ranks, unless another rank has done so."""
        limit = SILENT_BEATS * self._interval
        table = [
            {**seen.beat, "seconds": round(seen.seconds, 1), "silent": rank != self._rank and seen.silent_seconds > limit}
            for rank, seen in sorted(self._seen.items())
        ]
        blamed = [each for each in table if each["silent"]] or [each for each in table if not each["waits"]] or table
        lines = [_describe(each) for each in blamed]
        draft = self._folder / f"verdict_{self._rank}.json"
        draft.write_text(json.dumps({"table": table, "blamed": [each["rank"] for each in blamed]}), encoding="utf-8")
        try:
            os.link(draft, self._folder / "verdict.json")
        except FileExistsError:
            return  # another rank was faster; its verdict is read at the next heartbeat
        named = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        print(
            f"infini-train: error: the job hangs: {named}. Stacks of all processes: {self._stacks}. "
            "The same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )

    def _end_process(self, verdict: dict[str, Any]) -> None:
        """Dump this process's stacks, wait for those of the other ranks, and end the process."""
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        host = socket.gethostname()
        awake = [each["rank"] for each in verdict["table"] if not each["silent"] and each["host"] == host]
        if self._rank == min(awake, default=self._rank):
            for each in verdict["table"]:
                if each["silent"] and each["host"] == host:
                    _dump_silent_process(each["pid"], self._stacks / f"rank_{each['rank']}.txt")
        # When this process ends, communication of the others fails. Wait for their stacks, so that no such error is printed.
        expected = [self._stacks / f"rank_{each['rank']}.txt" for each in verdict["table"] if not each["silent"]]
        deadline = time.monotonic() + 3 * self._interval
        while time.monotonic() < deadline and not all(path.stat().st_size for path in expected):
            time.sleep(0.02)
        os._exit(HANG_EXIT_CODE)


def _describe(each: dict[str, Any]) -> str:
    state = ", silent" if each["silent"] else ""
    if each["silent"] and each["host"] == socket.gethostname() and _process_state(each["pid"]) == "T":
        state = ", stopped by a signal"
    who = f"rank {each['rank']} (host {each['host']}, pid {each['pid']}{state})"
    return f"{who} for {each['seconds']:.0f} s in {each['operation']}"


def _process_state(pid: int) -> str | None:
    """Return the state letter of a process on this machine from /proc: R, S, D, T (stopped) or Z; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return None


def _dump_silent_process(pid: int, path: Path) -> None:
    """Make a process of this machine dump its stacks, even if it is stopped or no thread gets the interpreter lock."""
    try:
        stopped = _process_state(pid) == "T"
        os.kill(pid, STACK_SIGNAL)
        if stopped:
            os.kill(pid, signal.SIGCONT)
        # Lines are written one by one, so the dump is complete when the file stops growing.
        deadline, size, since = time.monotonic() + 2.0, 0, time.monotonic()
        while time.monotonic() < deadline and not (size and time.monotonic() - since > 0.1):
            time.sleep(0.01)
            if (now := path.stat().st_size) != size:
                size, since = now, time.monotonic()
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    except OSError:
        return
