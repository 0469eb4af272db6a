"""Atomic creation of a data folder: it appears complete or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from infini_train.data.manifest import MANIFEST_FILE, SPLITS, index_file
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.tokenizer import TOKENIZER_FILES

LOCK_FILE = ".lock"


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder `<target>.partial`; rename it to `target` on success and remove it on an exception.

    Files that a killed process left in `<target>.partial` are removed first.

    Raises:
        UserError: if `target` exists and overwrite is false, if it holds files other than prepared data, or if another
            process is writing it.
    """
    # Replace the folder that a symbolic link points to, and keep the link: it may lead to another disk.
    target = target.resolve()
    replaced = target.with_name(target.name + ".replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)  # an earlier process was killed between the two renames below
    _check_replaceable(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    # The lock file is inside the folder and is renamed with it. So no other process can empty the folder between the last
    # write and the rename.
    with open(partial / LOCK_FILE, "w", encoding="utf-8") as lock:
        _lock(lock, target)
        for entry in partial.iterdir():
            if entry.name != LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield partial
            _check_replaceable(target, overwrite)
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    (target / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _lock(lock: TextIO, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is preparing data.path {target}; wait for it or choose another path") from error
    except OSError:
        # Some cluster file systems have no locks. There, the user must not start two processes at once.
        pass


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"data.path {target} is a file; choose a folder")
    names = {entry.name for entry in target.iterdir()}
    ours = {MANIFEST_FILE, *TOKENIZER_FILES, LOCK_FILE, *(index_file(split) for split in SPLITS)}
    foreign = sorted(n for n in names - ours if not (n.startswith(tuple(f"{s}-" for s in SPLITS)) and n.endswith(".tar")))
    if foreign:
        raise UserError(
            f"data.path {target} holds files that prepare did not write, such as {foreign[0]}; choose another data.path "
            "or move them away"
        )
    if names and not overwrite:
        raise UserError(f"data.path {target} is prepared already; pass --overwrite to replace it, or choose another path")
