"""Write result files completely or not at all, and report a failure in one line."""

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
def writing(name: object, remedy: str, also: type[Exception] = OSError) -> Iterator[None]:
    """Convert errors of writing a file or folder to a UserError.

    Args:
        name: name of the file, with the key that names it.
        remedy: what the user can do instead.
        also: exception that the writer raises besides OSError if the disk fails.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except (OSError, also) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{name} cannot be written ({reason}); {remedy}") from error


def write_result(path: Path, text: str, remedy: str = ANOTHER_RUN_DIR) -> None:
    """Replace a file atomically. Ctrl-C or a full disk never leaves half of it.

    Print the result before the call, so that it is not lost with the file.

    Raises:
        UserError: it cannot be written.
    """
    replacement = path.with_name(path.name + ".new")
    with writing(path, remedy):
        replacement.write_text(text, encoding="utf-8")
        replacement.replace(path)


def write_json(path: Path, content: dict[str, Any], remedy: str = ANOTHER_RUN_DIR) -> None:
    """Write an object with `write_result`, in standard JSON.

    Raises:
        UserError: it cannot be written.
    """
    write_result(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n", remedy)


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None, because standard JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def check_writable(folder: Path, name: object, remedy: str = ANOTHER_RUN_DIR) -> None:
    """Create the folder if needed and write a test file, so that a long measurement does not fail at its end.

    Raises:
        UserError: it cannot be written.
    """
    with writing(name, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
