"""Write checkpoints in the background: each rank writes its share, and rank 0 commits.

Training pauses while the state is copied to host memory. A thread of each rank then writes the copy. The threads use a process
group of their own, so that their messages never mix with those of training. If one rank fails, all ranks learn of it: nothing
is committed, and the written files are deleted.
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
from infini_train.runtime.errors import AgreedError


class SaveError(Exception):
    """A checkpoint could not be written; raised on all ranks."""


@dataclass
class Save:
    """One checkpoint that is being written."""

    step: int
    started: float
    pause_seconds: float = 0.0
    """Time for which training paused."""
    durable_seconds: float = 0.0
    """Time from the start of the save to the commit."""
    own_files_written: bool = False
    path: Path | None = None
    """The committed folder; None before."""
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


class _Files(dcp.FileSystemWriter):
    """A `FileSystemWriter` that records when this rank's files are written."""

    def __init__(self, path: Path, save: Save) -> None:
        # The tensors are in host memory already. With copy-ahead, torch would synchronize a stream of this thread's current
        # GPU. That is GPU 0 in every process, and each process would allocate GPU memory there.
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        self._save = save

    def write_data(self, *arguments: Any, **keywords: Any) -> Any:
        written = super().write_data(*arguments, **keywords)
        self._save.own_files_written = True
        return written


class CheckpointWriter:
    """Saves checkpoints, at most one at a time; a second save waits for the first.

    Args:
        is_main: whether this process creates folders, commits and deletes old checkpoints.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, is_main: bool) -> None:
        self.run_dir, self.config, self.is_main = run_dir, config, is_main
        self.group = _writers_group(config.timeout_seconds)
        self.failures_in_a_row = 0
        self._current: Save | None = None
        self._unreported: Save | None = None

    def save(self, step: int, stage: Callable[[], dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Start to write a checkpoint. A collective over all ranks.

        Args:
            stage: copies this rank's share to host memory and returns it by global name. Called after an earlier save has
                ended, so that two copies never exist.
            facts: content of state.json.

        Raises:
            AgreedError: the previous save was the second failure in a row, or it did not end in time.
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
        """Wait for the save in progress. A collective over all ranks.

        Args:
            must_succeed: raise on the first failure already, not only on the second in a row.

        Returns:
            The committed folder; None if no save was in progress or it failed.

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
                f"the checkpoint of step {current.step} could not be written: {current.error}; the newest intact one "
                "is kept: fix the cause and start the same command again"
            )
        return None

    def wait(self) -> None:
        """Wait until the save in progress has ended, successfully or not. For a process that is about to exit.

        Not a collective, because other ranks may have failed.
        """
        if self._current is not None:
            self._current.done.wait(timeout=self._remaining(self._current))

    def _remaining(self, current: Save) -> float:
        return max(0.0, current.started + self.config.timeout_seconds - time.monotonic())

    def report(self) -> dict[str, float]:
        """Return the times of the checkpoint committed since the last call, for the metrics; empty if there is none."""
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
        """Raise on all ranks if the save has not ended on one. Uses training's process group: the writers' group may hang."""
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
        except BaseException as error:  # an exception that leaves a thread would be lost
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
        except OSError as error:  # the other ranks wait for this rank's answer
            mine = f"rank {rank}: {error}"
        described: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(described, mine, group=self.group)
        failed = [answer for answer in described if isinstance(answer, str)]
        if failed:
            raise SaveError(failed[0])

        def commit() -> None:
            folder.write_durably(partial / folder.STATE_FILE, json.dumps(facts, indent=1))
            files = {name: entry for of_rank in described for name, entry in of_rank.items()}
            for name in (".metadata", folder.STATE_FILE):
                files[name] = folder.describe_file(partial / name)
            final = folder.commit(partial, files)
            folder.retain(self.run_dir, step, self.config.keep, self.config.keep_every)
            if self.config.copy_to is not None:
                _try_to_copy(final, self.config.copy_to)

        self._on_main(commit)
        return partial.with_suffix("")

    def _on_main(self, action: Callable[[], Any]) -> None:
        """Run an action on the main process while the others wait; raise SaveError on all ranks if it fails."""
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
    """Copy a checkpoint; on failure only warn, because the local checkpoint is intact."""
    try:
        copy_to_url(path, url)
    except Exception as error:  # every fsspec backend has its own exceptions
        print(f"\n{path} was not copied to {url}: {_one_line(error)}; training goes on", file=sys.stderr)


@cache
def _writers_group(timeout_seconds: float) -> Any:
    """Return the process group of all ranks for the writing threads; created once."""
    # Longer than training waits: its error message names the stalled rank, which a time-out of the group does not.
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * timeout_seconds))


def _first_cause(error: BaseException) -> str:
    """Return one line that names the failed rank and its error."""
    for rank, cause in failed_ranks(error).items():
        return f"rank {rank}: {_one_line(cause)}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    """Return an error as one line. Prefers the OSError behind it, which torch may have replaced with an error of its own."""
    while not isinstance(error, OSError):
        cause = error.__cause__ or error.__context__
        if cause is None or not (isinstance(error, RuntimeError) or isinstance(cause, OSError)):
            break
        error = cause
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
