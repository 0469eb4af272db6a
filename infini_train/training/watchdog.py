"""Ends a job in which no process makes progress, and says which one holds the others up.

A thread of every process writes what its process does to a file in the run directory, which all processes share (a store that
one of them serves would stop with it), and reads the file of the next process. A process is overdue when its operation takes
longer than its time limit; a job in which every process is overdue hangs. Ages come from each process's own clock and from the
reader's, never from a comparison of the two. Who is to blame: a process whose thread is silent as well (it is stopped, or its
machine is gone); else one that does not merely wait for others; else all.

The thread that finds out writes a verdict. Every thread that reads it writes the stacks of its process to stacks/rank_N.txt and
ends the process with HANG_EXIT_CODE. A stopped process cannot do that: it is woken for a moment to write its stacks, and
stopped again for the launcher to kill.
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
from infini_train.errors import UserError
from infini_train.parallel.activity import Activity
from infini_train.parallel.layout import initialize_process_group, raise_everywhere

HANG_EXIT_CODE = 86
"""Exit code of a job that the watchdog ended; started again, it goes on from the newest checkpoint."""
STACK_SIGNAL = signal.SIGUSR2
SILENT_BEATS = 4
"""A thread that misses so many beats is silent."""


@dataclass
class Seen:
    """The newest beat of a process, and when this process saw it for the first time."""

    beat: dict[str, Any]
    at: float

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self.at

    @property
    def seconds(self) -> float:
        """Time in its operation: as it said itself, and since."""
        return float(self.beat["seconds"]) + self.silent_seconds

    @property
    def overdue(self) -> bool:
        return self.seconds > self.beat["limit"]


class Watchdog:
    """Watches from `with Watchdog(run)` on until the block ends; a collective over all processes at its beginning.

    Attributes:
        activity: what this process is doing; to be kept up to date.
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
        # A name of its own for every start: processes of an earlier one may still be about.
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
        self._beat_now()
        # A process that stops right after a save must not be given the time of a save.
        self.activity.on_limit = self._beat_now
        dist.barrier()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._thread.is_alive():
            return
        self.activity.on_limit = lambda: None
        if kind is not None and (self._folder / "verdict.json").exists():
            # Other processes have been ended, and this one's communication with them fails: that is no news.
            self._thread.join()
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(STACK_SIGNAL)
        self._stack_file.close()
        # Each its own, and the last one the folders: another process may still be writing its beat.
        for file in (self._folder / f"rank_{self._rank}.json", self._stacks / f"rank_{self._rank}.txt"):
            with suppress(OSError):
                file.unlink()
            with suppress(OSError):
                file.parent.rmdir()

    def _watch(self) -> None:
        suspicious = 0
        while not self._ended.wait(self._interval):
            try:
                self._beat()
                self._look_at((self._rank + 1) % self._world_size)
                if (self._folder / "verdict.json").exists():
                    self._end_process(json.loads((self._folder / "verdict.json").read_text(encoding="utf-8")))
                if any(self._seen[rank].overdue for rank in (self._rank, (self._rank + 1) % self._world_size)):
                    suspicious += 1
                    for rank in range(self._world_size):
                        self._look_at(rank)
                    # Silence shows only after some beats.
                    if suspicious > SILENT_BEATS and all(seen.overdue for seen in self._seen.values()):
                        self._pass_verdict()
                else:
                    suspicious = 0
            except (OSError, ValueError, KeyError):
                # A file system with a hiccup must not end a run; neither must the end of another process's folder.
                continue

    def _beat_now(self) -> None:
        # A failure is the file system's, and the next beat's chance; it must not end the run.
        with suppress(OSError):
            self._beat()

    def _beat(self) -> None:
        operation, waits, seconds = self.activity.now()
        if self.activity.step:
            operation += f" in step {self.activity.step}"
        with self._beating:
            self._write_beat(operation, waits, seconds)

    def _write_beat(self, operation: str, waits: bool, seconds: float) -> None:
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

    def _look_at(self, rank: int) -> None:
        if rank == self._rank:
            return
        try:
            beat = json.loads((self._folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            # It has left, alone if the run is not over: the others may wait for it for ever, and its last beat grows old. Their
            # own time limits hold on; that of what it did then, perhaps the first step's, does not.
            last = self._seen.get(rank) or Seen(self._left(rank), time.monotonic())
            self._seen[rank] = Seen({**last.beat, "limit": self._limits["step"]}, last.at)
            return
        if rank not in self._seen or self._seen[rank].beat["beats"] != beat["beats"]:
            self._seen[rank] = Seen(beat, time.monotonic())

    def _left(self, rank: int) -> dict[str, Any]:
        """In place of the beat of a process of which none was seen."""
        return {
            "rank": rank,
            "host": "unknown",
            "pid": 0,
            "beats": -1,
            "operation": "a run that it has left",
            "waits": False,
            "seconds": 0.0,
        }

    def _pass_verdict(self) -> None:
        """Name the culprits, once in the job."""
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
            return  # another process was faster; its verdict is read at the next beat
        named = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        print(
            f"infini-train: error: the job hangs: {named}. Stacks of all processes: {self._stacks}. "
            "The same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )

    def _end_process(self, verdict: dict[str, Any]) -> None:
        """Write this process's stacks, wait for those of the others, and end."""
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        host = socket.gethostname()
        awake = [each["rank"] for each in verdict["table"] if not each["silent"] and each["host"] == host]
        if self._rank == min(awake, default=self._rank):
            for each in verdict["table"]:
                if each["silent"] and each["host"] == host:
                    _stacks_of_silent_process(each["pid"], self._stacks / f"rank_{each['rank']}.txt")
        # Whoever ends makes the communication of the others fail, which must not be what a user reads.
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
    """Linux's letter for a process of this machine: R, S, D, T (stopped), Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return None


def _stacks_of_silent_process(pid: int, path: Path) -> None:
    """Have a process of this machine write its stacks, although its threads do not run or do not get the interpreter."""
    try:
        stopped = _process_state(pid) == "T"
        os.kill(pid, STACK_SIGNAL)
        if stopped:
            os.kill(pid, signal.SIGCONT)
        # Lines are written one by one: finished is what has stopped growing.
        deadline, size, since = time.monotonic() + 2.0, 0, time.monotonic()
        while time.monotonic() < deadline and not (size and time.monotonic() - since > 0.1):
            time.sleep(0.01)
            if (now := path.stat().st_size) != size:
                size, since = now, time.monotonic()
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    except OSError:
        return
