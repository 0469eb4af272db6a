"""A checkpoint's folder and its commit protocol; without torch, so that any machine can list and verify checkpoints.

    step_00000200.partial/      while its files are written
    step_00000200.damaged/      it could not be read, and the run went on without it
    step_00000200/
        *.distcp .metadata      tensors (torch.distributed.checkpoint)
        state.json              step, tokens, configuration, versions
        manifest.json           size and SHA-256 of each of the above
        COMMITTED               SHA-256 of manifest.json; written last

Every file is flushed to the disk before the next is begun. A folder without a COMMITTED that fits its manifest is not a
checkpoint, whatever it holds; one whose files do not fit the manifest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from infini_train.errors import UserError
from infini_train.storage import patiently

FORMAT_VERSION = 2
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
COMMIT_FILE = "COMMITTED"


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a folder `step_XXXXXXXX`."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first; whether their files are whole is for `damage` to say."""
    found = [path for path in checkpoint_root(run_dir).glob("step_*") if path.name[5:].isdigit() and is_committed(path)]
    return sorted(found, key=step_of)


def is_committed(path: Path) -> bool:
    """Whether the commit marker stands and fits the manifest; also where that cannot be read, which is for `damage` to say:
    what is not committed is deleted."""

    def fits() -> bool:
        return (path / COMMIT_FILE).read_text(encoding="ascii").strip() == file_digest(path / MANIFEST_FILE)

    try:
        return patiently(fits, path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path) -> str:
    return patiently(lambda: path.read_text(encoding="utf-8"), path)


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of the manifest by file name.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
    try:
        manifest = json.loads(_text(path / MANIFEST_FILE))
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {MANIFEST_FILE} cannot be read ({error}); use an older checkpoint") from error
    if version != FORMAT_VERSION:
        raise UserError(f"checkpoint {path} has format {version}; this version reads format {FORMAT_VERSION}")
    return files


def damaged_file(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint; None if it is whole."""
    file = path / name

    def read() -> str | None:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if file_digest(file) != entry["sha256"]:
            return f"{name} does not have the checksum in {MANIFEST_FILE}"
        return None

    try:
        return patiently(read, file)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def damage(path: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty if it can be trusted. Reads all of it."""
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
    """Step, tokens, configuration, versions and counters of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(_text(path / STATE_FILE))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}: {STATE_FILE} cannot be read ({error}); delete the folder to use an older one"
        ) from error


def start_folder(run_dir: Path, step: int) -> Path:
    """An empty folder under a temporary name; what an earlier try left there is deleted."""
    partial = checkpoint_root(run_dir) / f"{folder_name(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there, whole, after a power cut."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(partial: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Turn a folder whose files are all written and synced into a checkpoint.

    Args:
        files: manifest entries of everything in it.
    """
    write_durably(partial / MANIFEST_FILE, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
    sync_folder(partial)
    final = partial.with_suffix("")
    delete(final)  # an uncommitted or damaged one of the same step
    os.rename(partial, final)
    sync_folder(final.parent)
    write_marker(final)
    return final


def write_marker(path: Path) -> None:
    """The one file that makes a folder a checkpoint."""
    write_durably(path / COMMIT_FILE, file_digest(path / MANIFEST_FILE))
    sync_folder(path)


def delete(path: Path) -> None:
    """Remove a checkpoint; its marker first, so that what an interrupted deletion leaves is not trusted."""
    (path / COMMIT_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


ASIDE = ".damaged"


def set_aside(path: Path) -> None:
    """Take a checkpoint out of those of its run, under a name of its own; one that was set aside before makes room."""
    aside = path.with_suffix(ASIDE)
    delete(aside)
    path.rename(aside)


def retain(run_dir: Path, newest: int, keep: int, keep_every: int) -> None:
    """Delete what is older than the newest `keep` checkpoints, except steps that `keep_every` divides (0: none is kept so),
    and what is left of interrupted saves.

    Args:
        newest: step of the checkpoint that was committed just now. One of a later step could not be read, or the run would have
            gone on from it: it counts for nothing from now on. It is set aside and not deleted, for it may have been the
            storage that failed.
    """
    committed = {step_of(path): path for path in list_checkpoints(run_dir)}
    for step, path in committed.items():
        if step > newest:
            set_aside(path)
    whole = [step for step in committed if step <= newest]
    for step in whole[:-keep]:
        if not keep_every or step % keep_every:
            delete(committed[step])
    for path in checkpoint_root(run_dir).glob("step_*"):
        number = path.name[5:].removesuffix(".partial")
        if number.isdigit() and int(number) <= newest and not is_committed(path):
            delete(path)
