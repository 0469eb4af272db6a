"""A copy of a committed checkpoint under any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path

import fsspec

from infini_train.checkpoint.folder import COMMIT_FILE
from infini_train.errors import UserError


def check_url(url: str) -> None:
    """Refuse a URL for which no backend is there; nothing is read or written.

    Raises:
        UserError: naming what is missing.
    """
    try:
        fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"checkpoint.copy_to is {url}, which cannot be written to: {error}; use file://, or install fsspec's backend for "
            "it (s3fs for s3://, gcsfs for gs://)"
        ) from error


def copy_to_url(path: Path, url: str) -> None:
    """Copy a checkpoint to URL/step_XXXXXXXX, its commit marker last: an unfinished copy is no checkpoint there either."""
    filesystem, root = fsspec.core.url_to_fs(url)
    target = f"{root.rstrip('/')}/{path.name}"
    filesystem.makedirs(target, exist_ok=True)
    files = sorted(path.iterdir(), key=lambda file: file.name == COMMIT_FILE)
    for file in files:
        filesystem.put_file(str(file), f"{target}/{file.name}")
