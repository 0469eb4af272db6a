"""Full model weights as one safetensors file, as `checkpoint consolidate` and `convert` write it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infini_train.runtime.errors import UserError

SUFFIX = ".safetensors"


def write_weights_file(path: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a weights file; it replaces an existing one atomically.

    Args:
        weights: full tensors, by global name.
        facts: metadata of the source checkpoint: step, config, tokenizer_fingerprint.
    """
    metadata = {key: json.dumps(facts[key]) for key in ("step", "config", "tokenizer_fingerprint")}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(weights, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors lets only the owner read it
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # do not leave an incomplete file on a full disk
        raise


def read_weights_facts(path: Path, key: str = "--from_checkpoint") -> dict[str, Any]:
    """Read the metadata (step, config, tokenizer_fingerprint) without the weights.

    Args:
        key: option or config key with which the user named the file, for the error message.

    Raises:
        UserError: there is no such file, or `checkpoint consolidate` did not write it.
    """
    if not path.is_file():
        raise UserError(f"{key} {path}: there is no such file; `infini-train checkpoint consolidate` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{key} {path}: {error}; write it again with `infini-train checkpoint consolidate`") from None
    if "tokenizer_fingerprint" not in metadata:
        raise UserError(
            f"{key} {path}: it does not say which tokenizer it was trained with; write it with `infini-train checkpoint "
            "consolidate`, or with `infini-train convert` from a model of Hugging Face"
        )
    return {name: json.loads(value) for name, value in metadata.items()}


def read_weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a weights file, by global name."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)


def read_weights(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a weights file one by one, so that a process holds only one at a time."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)
