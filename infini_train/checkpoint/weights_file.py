"""The weights of a model, whole and in float32, as one safetensors file: what `checkpoint consolidate` writes."""

from __future__ import annotations

import json
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
    save_file(weights, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors leaves it to its owner alone
    partial.replace(path)


def read_weights_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without reading the weights.

    Raises:
        UserError: there is no such file, or `checkpoint consolidate` did not write it.
    """
    if not path.is_file():
        raise UserError(f"--from_checkpoint {path}: there is no such file; `infini-train checkpoint consolidate` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"--from_checkpoint {path}: {error}; write it again with `infini-train checkpoint consolidate`"
        ) from None
    if "tokenizer_fingerprint" not in metadata:
        raise UserError(
            f"--from_checkpoint {path}: it does not say which tokenizer it was trained with; write it with "
            "`infini-train checkpoint consolidate`"
        )
    return {key: json.loads(value) for key, value in metadata.items()}
