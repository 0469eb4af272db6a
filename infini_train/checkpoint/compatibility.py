"""Check whether saved weights fit a run's configuration, from the metadata saved with them. Needs no process group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infini_train.checkpoint import folder
from infini_train.checkpoint.reader import describe_tensors
from infini_train.checkpoint.weights_file import SUFFIX, read_weights_facts, read_weights_shapes
from infini_train.config import ModelConfig, RunConfig
from infini_train.runtime.errors import UserError

FIXED_MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "rotary_base",
    "rotary_scaling",
    "norm_eps",
    "tie_embeddings",
)
"""Keys of `model` that must be equal for weights to be reused. Attention, memory and segment length may change."""
ATTENTION_SUFFIXES = ("attention.gate", "attention.write_gate", "memory_tokens")
"""Name endings of parameters of one kind of attention. Initial weights may lack them; they then start as in a new model."""


def check_same_model(facts: Mapping[str, Any], path: Path, run: RunConfig, tokenizer_fingerprint: str) -> None:
    """Check that a checkpoint has the run's tokenizer and `model` section.

    Raises:
        UserError: the tokenizer or a key of `model` differs.
    """
    _check_tokenizer(f"checkpoint {path}", facts, run, tokenizer_fingerprint)
    for key, saved in _saved_model(facts).items():
        if (value := getattr(run.model, key)) != saved:
            raise UserError(
                f"model.{key} is {value}, but checkpoint {path} was trained with {saved}; set it back, or choose a new run_dir"
            )


def check_initial_weights(run: RunConfig, tokenizer_fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check before a run begins that `training.initial_weights` exist and fit the model.

    Args:
        shapes: full shape of every parameter of the run's model, by global name.

    Raises:
        UserError: the weights are missing, or the tokenizer, a key of `model`, a parameter or a shape differs.
    """
    path = Path(str(run.training.initial_weights))
    named = f"training.initial_weights {path}"
    facts = initial_weights_facts(path)
    _check_tokenizer(named, facts, run, tokenizer_fingerprint)
    saved_model = _saved_model(facts)
    for key in FIXED_MODEL_KEYS:
        ours, saved = getattr(run.model, key), saved_model[key]
        if ours != saved:
            raise UserError(f"model.{key} is {ours}, but {named} has {saved}; set model.{key} to {saved}")
    stored = usable_shapes(path, facts, run)
    if unknown := sorted(stored.keys() - shapes.keys()):
        raise UserError(
            f"{named} holds {unknown[0]}, which a model with this configuration does not have (it was written with "
            f"model.attention {saved_model['attention']}); set the keys of model that it was trained with"
        )
    if lacking := sorted(name for name in shapes.keys() - stored.keys() if not name.endswith(ATTENTION_SUFFIXES)):
        raise UserError(
            f"{named} lacks {lacking[0]}, which a model with this configuration has; set the keys of model that the weights "
            "were trained with"
        )
    for name, shape in sorted(stored.items()):
        if shape != shapes[name]:
            raise UserError(f"{named}: {name} is {list(shape)} there, but {list(shapes[name])} in this model")


def usable_shapes(path: Path, facts: Mapping[str, Any], run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return the `stored_shapes` of the parameters that this run can use.

    If the weights were trained with another attention, their gates and memory tokens are left out, even if the names match.
    """
    stored = stored_shapes(path)
    if _saved_model(facts)["attention"] == run.model.attention:
        return stored
    return {name: shape for name, shape in stored.items() if not name.endswith(ATTENTION_SUFFIXES)}


def initial_weights_facts(path: Path) -> dict[str, Any]:
    """Read the metadata of the weights at `training.initial_weights`, a weights file or a checkpoint folder.

    Raises:
        UserError: the path is neither a weights file nor a committed checkpoint.
    """
    if path.suffix == SUFFIX:
        return read_weights_facts(path, "training.initial_weights")
    if not folder.is_committed(path):
        raise UserError(
            f"training.initial_weights {path}: there is no finished checkpoint; name a folder step_XXXXXXXX, or a {SUFFIX} "
            "file of `infini-train convert` or `infini-train checkpoint consolidate`"
        )
    return folder.read_state_file(path)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every weight of a weights file or a checkpoint folder, by global name."""
    if path.suffix == SUFFIX:
        return read_weights_shapes(path)
    prefix = "model."
    described = describe_tensors(path)
    found = {name.removeprefix(prefix): tuple(entry.size) for name, entry in described.items() if name.startswith(prefix)}
    return join_block_shapes(found)


def join_block_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Join the shapes of fused matrices, which a checkpoint stores as blocks along the first dimension."""
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        fused_name = split_block_name(name)[0]
        before = joined.get(fused_name, (0, *shape[1:]))
        joined[fused_name] = (before[0] + shape[0], *shape[1:]) if fused_name != name else shape
    return joined


def split_block_name(name: str) -> tuple[str, int]:
    """Split the checkpoint name of a fused matrix's block into the matrix's name and the block's number.

    A fused matrix (SwiGLU's gate and up) is stored as NAME.0 and NAME.1. Any other name is returned with number 0.
    """
    block = re.fullmatch(r"(.*\.weight)\.(\d+)", name)
    return (block[1], int(block[2])) if block else (name, 0)


def _saved_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` section of the run that wrote the facts; keys added since then have their defaults."""
    return {**asdict(ModelConfig()), **facts["config"]["model"]}


def _check_tokenizer(named: str, facts: Mapping[str, Any], run: RunConfig, tokenizer_fingerprint: str) -> None:
    if facts["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise UserError(
            f"{named} was trained with tokenizer {facts['tokenizer_fingerprint'][:12]}, but data.path {run.data.path} holds "
            f"{tokenizer_fingerprint[:12]}; use data that was prepared with that tokenizer (data.tokenizer)"
        )
