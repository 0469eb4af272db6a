"""Writes checkpoints beside the training: every process its share, one commit at the end.

Training pauses while the state is copied to host memory. From there a thread of each process writes, over a process group of
its own, so that its messages never mix with training's. All processes learn of a failure on one of them: nothing is committed,
and what was written is deleted.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from infini_train.checkpoint import folder
from infini_train.checkpoint.reader import failed_ranks
from infini_train.checkpoint.remote import copy_to_url
from infini_train.config import CheckpointConfig
from infini_train.errors import AgreedError


class SaveError(Exception):
    """A checkpoint was not written; the same on all processes."""


@dataclass
class Save:
    """One checkpoint on its way to the disk."""

    step: int
    started: float
    pause_seconds: float = 0.0
    """How long training stood still for it."""
    durable_seconds: float = 0.0
    """From the beginning to the commit."""
    own_files_written: bool = False
    path: Path | None = None
    """Where it is, once committed."""
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


class _Files(dcp.FileSystemWriter):
    """torch.distributed.checkpoint's writer, which says when this process's files are written."""

    def __init__(self, path: Path, save: Save) -> None:
        # What is written is in host memory. With a copy ahead torch would synchronize a stream of the first GPU, which is this
        # thread's current one in every process, and each would take memory there.
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        self._save = save

    def write_data(self, *arguments: Any, **keywords: Any) -> Any:
        written = super().write_data(*arguments, **keywords)
        self._save.own_files_written = True
        return written


class CheckpointWriter:
    """At most one checkpoint at a time is on its way; a second waits for the first.

    Args:
        is_main: whether this process makes folders, commits and deletes.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, is_main: bool) -> None:
        self.run_dir, self.config, self.is_main = run_dir, config, is_main
        self.group = _writers_group(config.timeout_seconds)
        self.failures_in_a_row = 0
        self._current: Save | None = None
        self._unreported: Save | None = None

    def save(self, step: int, stage: Callable[[], dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Begin to write a checkpoint; a collective over all processes.

        Args:
            stage: makes copies of this process's share in host memory, by global name. Called when an earlier save is done, so
                that two copies never exist.
            facts: what state.json holds.

        Raises:
            AgreedError: the save before this one failed for the second time in a row, or does not end.
        """
        started = time.monotonic()
        self.finish()
        entries = stage()
        self._current = current = Save(step, started, pause_seconds=time.monotonic() - started)
        if self.config.asynchronous:
            threading.Thread(target=self._write, args=(current, entries, facts), daemon=True, name="checkpoint").start()
        else:
            self._write(current, entries, facts)
            current.pause_seconds = time.monotonic() - started

    def finish(self, *, must_succeed: bool = False) -> Path | None:
        """Wait for the save that is on its way; a collective over all processes.

        Args:
            must_succeed: whether the first failure stops the run, and not only the second in a row.

        Returns:
            The committed folder; None if nothing was on its way or it failed.

        Raises:
            AgreedError: see `save`.
        """
        current, self._current = self._current, None
        if current is None:
            return None
        ended = current.done.wait(timeout=self._remaining(current))
        self._stop_if_stalled(current, ended)
        if current.error is None:
            self.failures_in_a_row = 0
            return current.path
        self.failures_in_a_row += 1
        if must_succeed or self.failures_in_a_row > 1:
            raise AgreedError(
                f"the checkpoint of step {current.step} could not be written: {current.error}; the newest whole one remains: "
                "mend the cause and start the same command again"
            )
        return None

    def wait(self) -> None:
        """Wait until the save that is on its way has ended, well or not: for a process that ends, however it does.

        No collective: the others may have failed.
        """
        if self._current is not None:
            self._current.done.wait(timeout=self._remaining(self._current))

    def _remaining(self, current: Save) -> float:
        return max(0.0, current.started + self.config.timeout_seconds - time.monotonic())

    def report(self) -> dict[str, float]:
        """Times of a checkpoint that became durable since the last call, for the metrics."""
        save = self._unreported
        if save is None:
            return {}
        self._unreported = None
        return {
            "checkpoint_step": save.step,
            "checkpoint_pause_seconds": save.pause_seconds,
            "checkpoint_durable_seconds": save.durable_seconds,
        }

    def _stop_if_stalled(self, current: Save, ended: bool) -> None:
        """All processes together, over training's own groups: the writers' group may be what hangs."""
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (ended, current.own_files_written))
        if all(done for done, _ in states):
            return
        slow = [str(rank) for rank, (_, written) in enumerate(states) if not written]
        where = f"rank {', '.join(slow)} has not written its files" if slow else "it was not committed"
        raise AgreedError(
            f"the checkpoint of step {current.step} did not end: {where} after {self.config.timeout_seconds:g} s; look at that "
            "machine's storage, or raise checkpoint.timeout_seconds"
        )

    def _write(self, current: Save, entries: dict[str, Tensor], facts: dict[str, Any]) -> None:
        partial = folder.checkpoint_root(self.run_dir) / f"{folder.folder_name(current.step)}.partial"
        try:
            self._on_main(lambda: folder.start_folder(self.run_dir, current.step))
            dcp.save(entries, storage_writer=_Files(partial, current), process_group=self.group)
            current.path = self._commit(partial, current.step, facts)
            current.durable_seconds = time.monotonic() - current.started
            self._unreported = current
        except BaseException as error:  # a thread's exception would be lost
            current.error = _first_cause(error)
            if self.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                print(f"\ncheckpoint of step {current.step} failed: {current.error}; training goes on", file=sys.stderr)
        finally:
            current.done.set()

    def _commit(self, partial: Path, step: int, facts: dict[str, Any]) -> Path:
        rank = dist.get_rank()
        mine: Any
        try:
            mine = {path.name: folder.describe_file(path) for path in partial.glob(f"__{rank}_*")}
        except OSError as error:  # the others wait for an answer
            mine = f"rank {rank}: {error}"
        described: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(described, mine, group=self.group)
        failed = [answer for answer in described if isinstance(answer, str)]
        if failed:
            raise SaveError(failed[0])

        def commit() -> None:
            folder.write_durably(partial / folder.STATE_FILE, json.dumps(facts, indent=1))
            files = {name: entry for part in described for name, entry in part.items()}
            for name in (".metadata", folder.STATE_FILE):
                files[name] = folder.describe_file(partial / name)
            final = folder.commit(partial, files)
            folder.retain(self.run_dir, step, self.config.keep, self.config.keep_every)
            if self.config.copy_to is not None:
                _try_to_copy(final, self.config.copy_to)

        self._on_main(commit)
        return partial.with_suffix("")

    def _on_main(self, action: Callable[[], Any]) -> None:
        """Do something on the main process; all others wait, and learn of its failure."""
        error: list[Any] = [None]
        if self.is_main:
            try:
                action()
            except Exception as failure:
                error = [f"rank 0: {failure}"]
        dist.broadcast_object_list(error, src=0, group=self.group)
        if error[0] is not None:
            raise SaveError(error[0])


def _try_to_copy(path: Path, url: str) -> None:
    """A store out of reach costs the copy, not the run: the checkpoint itself is whole."""
    try:
        copy_to_url(path, url)
    except Exception as error:  # each of fsspec's backends has exceptions of its own
        print(f"\n{path} was not copied to {url}: {_one_line(error)}; training goes on", file=sys.stderr)


@cache
def _writers_group(timeout_seconds: float) -> Any:
    """All processes, for the writing threads; made once."""
    # Longer than training waits, which can say more about a stalled process than a time-out.
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout_seconds))


def _first_cause(error: BaseException) -> str:
    """One line: which rank, and what happened there."""
    for rank, cause in failed_ranks(error).items():
        return f"rank {rank}: {_one_line(cause)}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    """The operating system's reason if there is one behind the error, which torch may have covered with its own."""
    while not isinstance(error, OSError):
        behind = error.__cause__ or error.__context__
        if behind is None or not (isinstance(error, RuntimeError) or isinstance(behind, OSError)):
            break
        error = behind
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
