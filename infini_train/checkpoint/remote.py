"""A copy of a committed checkpoint under any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path

import fsspec

from infini_train.checkpoint.folder import COMMIT_FILE


def copy_to_url(path: Path, url: str) -> None:
    """Copy a checkpoint to URL/step_XXXXXXXX, its commit marker last: an unfinished copy is no checkpoint there either."""
    filesystem, root = fsspec.core.url_to_fs(url)
    target = f"{root.rstrip('/')}/{path.name}"
    filesystem.makedirs(target, exist_ok=True)
    files = sorted(path.iterdir(), key=lambda file: file.name == COMMIT_FILE)
    for file in files:
        filesystem.put_file(str(file), f"{target}/{file.name}")
