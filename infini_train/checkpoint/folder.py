"""Checkpoint folders and their commit protocol. Needs no torch, so that any machine can list and verify checkpoints.

    step_00000200.partial/      while its files are written
    step_00000200.damaged/      could not be read; the run continued from an older checkpoint
    step_00000200/
        *.distcp .metadata      tensors (torch.distributed.checkpoint)
        state.json              step, tokens, configuration, versions
        manifest.json           size and SHA-256 of each of the above
        COMMITTED               SHA-256 of manifest.json; written last

Each file is synced to the disk before the next one is written. A folder is a checkpoint only if COMMITTED matches its manifest.
A checkpoint whose files do not match the manifest is damaged.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from infini_train.runtime.errors import UserError
from infini_train.runtime.files import file_digest
from infini_train.runtime.retries import retry_read

FORMAT_VERSION = 2
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
COMMIT_FILE = "COMMITTED"


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Parse the step from a folder's name `step_XXXXXXXX`."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the committed checkpoints of a run, oldest first. Does not check their files; see `damage`."""
    found = [path for path in checkpoint_root(run_dir).glob("step_*") if path.name[5:].isdigit() and is_committed(path)]
    return sorted(found, key=step_of)


def is_committed(path: Path) -> bool:
    """Return whether the commit marker exists and matches the manifest.

    Also True if either cannot be read because of a storage error: uncommitted folders are deleted, and `damage` reports the
    error.
    """

    def marker_matches() -> bool:
        return (path / COMMIT_FILE).read_text(encoding="ascii").strip() == file_digest(path / MANIFEST_FILE)

    try:
        return retry_read(marker_matches, path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True


def _read_text(path: Path) -> str:
    return retry_read(lambda: path.read_text(encoding="utf-8"), path)


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's manifest entry: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Read the entries of the manifest, by file name.

    Raises:
        UserError: the manifest cannot be read, or has another format version.
    """
    try:
        manifest = json.loads(_read_text(path / MANIFEST_FILE))
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {MANIFEST_FILE} cannot be read ({error}); use an older checkpoint") from error
    if version != FORMAT_VERSION:
        raise UserError(f"checkpoint {path} has format {version}; this version reads format {FORMAT_VERSION}")
    return files


def damaged_file(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    """Return a description of one file's damage; None if the file matches its manifest entry."""
    file = path / name

    def read() -> str | None:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if file_digest(file) != entry["sha256"]:
            return f"{name} does not have the checksum in {MANIFEST_FILE}"
        return None

    try:
        return retry_read(read, file)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def damage(path: Path) -> list[str]:
    """Return one line for each defect of a checkpoint; empty if it is intact. Reads all files."""
    if not path.is_dir():
        return [f"{path} is not a folder"]
    if not is_committed(path):
        if not (path / COMMIT_FILE).is_file():
            return [f"{COMMIT_FILE} is missing: it was never finished"]
        return [f"{COMMIT_FILE} does not fit {MANIFEST_FILE}"]
    try:
        entries = read_manifest(path)
    except UserError as error:
        return [str(error)]
    return [wrong for name, entry in sorted(entries.items()) if (wrong := damaged_file(path, name, entry)) is not None]


def read_state_file(path: Path) -> dict[str, Any]:
    """Read the step, tokens, configuration, versions and health counters of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(_read_text(path / STATE_FILE))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}: {STATE_FILE} cannot be read ({error}); delete the folder to use an older one"
        ) from error


def start_folder(run_dir: Path, step: int) -> Path:
    """Create an empty folder under a temporary name; delete the remains of an earlier attempt."""
    partial = checkpoint_root(run_dir) / f"{folder_name(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_durably(path: Path, text: str) -> None:
    """Write a small file and sync it, so that its content survives a power failure."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync a folder, so that its file names survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(partial: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Turn a folder whose files are all written and synced into a committed checkpoint.

    Args:
        files: manifest entries of all files in it.
    """
    write_durably(partial / MANIFEST_FILE, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
    sync_folder(partial)
    final = partial.with_suffix("")
    delete(final)  # an uncommitted or damaged checkpoint of the same step
    os.rename(partial, final)
    sync_folder(final.parent)
    write_marker(final)
    return final


def write_marker(path: Path) -> None:
    """Write COMMITTED, the file that makes a folder a checkpoint."""
    write_durably(path / COMMIT_FILE, file_digest(path / MANIFEST_FILE))
    sync_folder(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, its marker first: an interrupted deletion then leaves an uncommitted folder."""
    (path / COMMIT_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


ASIDE = ".damaged"


def set_aside(path: Path) -> None:
    """Rename a checkpoint to `.damaged`, so that it is no longer listed; replaces one of the same step set aside before."""
    aside = path.with_suffix(ASIDE)
    delete(aside)
    path.rename(aside)


def retain(run_dir: Path, newest: int, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the remains of interrupted saves.

    Checkpoints of later steps than `newest` are set aside: the run would have resumed from them if they could have been read.
    They are not deleted, because the storage may have failed and not the checkpoint.

    Args:
        newest: step of the checkpoint that was just committed.
        keep: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps no others.
    """
    committed = {step_of(path): path for path in list_checkpoints(run_dir)}
    for step, path in committed.items():
        if step > newest:
            set_aside(path)
    readable = [step for step in committed if step <= newest]
    for step in readable[:-keep]:
        if not keep_every or step % keep_every:
            delete(committed[step])
    for path in checkpoint_root(run_dir).glob("step_*"):
        number = path.name[5:].removesuffix(".partial")
        if number.isdigit() and int(number) <= newest and not is_committed(path):
            delete(path)
