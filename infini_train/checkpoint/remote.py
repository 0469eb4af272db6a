"""Copy committed checkpoints to any URL that fsspec supports."""

from __future__ import annotations

from pathlib import Path

import fsspec

from infini_train.checkpoint.folder import COMMIT_FILE
from infini_train.runtime.errors import UserError


def check_url(url: str) -> None:
    """Check that fsspec has a backend for a URL; reads and writes nothing.

    Raises:
        UserError: the backend is unknown or not installed.
    """
    try:
        fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"checkpoint.copy_to is {url}, which cannot be written to: {error}; use file://, or install fsspec's backend for "
            "it (s3fs for s3://, gcsfs for gs://)"
        ) from error


def copy_to_url(path: Path, url: str) -> None:
    """Copy a checkpoint to URL/step_XXXXXXXX, its commit marker last, so that an unfinished copy counts as uncommitted."""
    filesystem, root = fsspec.core.url_to_fs(url)
    target = f"{root.rstrip('/')}/{path.name}"
    filesystem.makedirs(target, exist_ok=True)
    files = sorted(path.iterdir(), key=lambda file: file.name == COMMIT_FILE)
    for file in files:
        filesystem.put_file(str(file), f"{target}/{file.name}")
