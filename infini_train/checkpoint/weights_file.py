"""The weights of a model, whole, as one safetensors file: what `checkpoint consolidate` and `convert` write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infini_train.errors import UserError

SUFFIX = ".safetensors"


def write_weights_file(path: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replaces the file at once.

    Args:
        weights: by global name.
        facts: of the checkpoint that they come from: step, config, tokenizer_fingerprint.
    """
    metadata = {key: json.dumps(facts[key]) for key in ("step", "config", "tokenizer_fingerprint")}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(weights, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors leaves it to its owner alone
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk half of it would stay
        raise


def read_weights_facts(path: Path, key: str = "--from_checkpoint") -> dict[str, Any]:
    """The facts alone, without reading the weights.

    Args:
        key: what the user named the file with.

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
    """Shape of every tensor of a weights file, by global name."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def read_weights(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a weights file one after another, so that a process needs the memory of one."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)
