"""Atomic writes of result files. A write error becomes a `UserError` of one line."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from infini_train.runtime.errors import UserError

ANOTHER_RUN_DIR = "free space there, or give another --run_dir, and the checkpoint with --from_checkpoint"
COPIED_RUN_DIR = "free space there, or copy the folder to where you can write and give the copy with --run_dir"


@contextmanager
def report_write_errors(name: object, remedy: str, other_error: type[Exception] = OSError) -> Iterator[None]:
    """Turn errors of the enclosed writes into a `UserError`.

    Args:
        name: path of the file or folder, with the key or flag that sets it.
        remedy: the action that the user can take.
        other_error: an exception other than OSError that the writer raises when the disk refuses a write.

    Raises:
        UserError: if the file or folder cannot be written.
    """
    try:
        yield
    except (OSError, other_error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{name} cannot be written ({reason}); {remedy}") from error


def write_result(path: Path, text: str, remedy: str = ANOTHER_RUN_DIR) -> None:
    """Write a text file atomically: the file holds the old text or the new text, also after Ctrl-C or on a full disk.

    Print the results before the call, so that a write error does not lose them.

    Raises:
        UserError: if the file cannot be written.
    """
    replacement = path.with_name(path.name + ".new")
    with report_write_errors(path, remedy):
        replacement.write_text(text, encoding="utf-8")
        replacement.replace(path)


def write_json(path: Path, content: dict[str, Any], remedy: str = ANOTHER_RUN_DIR) -> None:
    """Write an object atomically as strict JSON, without NaN and infinity; see `write_result`.

    Raises:
        UserError: if the file cannot be written.
    """
    write_result(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n", remedy)


def without_nan(value: Any) -> Any:
    """Replace every NaN and infinity in a nested value by None (null).

    JSON does not define them, and readers other than Python's refuse them.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def check_writable(folder: Path, name: object, remedy: str = ANOTHER_RUN_DIR) -> None:
    """Create the folder if it is missing and write a temporary file in it.

    Called before a long measurement, so that an error is found before the measurement and not after it.

    Raises:
        UserError: if the folder cannot be created or written.
    """
    with report_write_errors(name, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
