"""Whether saved weights fit a run, told from what was written beside them; without process groups."""

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
from infini_train.errors import UserError

SAME_FUNCTION = (
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
"""Keys of `model` without which weights mean something else. Attention, memory and segment length are learned anew."""
DRAWN = ("attention.gate", "attention.write_gate", "memory_tokens")
"""Parameters of an attention that weights of another do not have, and that may begin as in a new model."""


def check_same_model(facts: Mapping[str, Any], path: Path, run: RunConfig, tokenizer_fingerprint: str) -> None:
    """Refuse a checkpoint of another tokenizer or another `model` section.

    Raises:
        UserError: naming what differs.
    """
    _check_tokenizer(f"checkpoint {path}", facts, run, tokenizer_fingerprint)
    for key, saved in _saved_model(facts).items():
        if (value := getattr(run.model, key)) != saved:
            raise UserError(
                f"model.{key} is {value}, but checkpoint {path} was trained with {saved}; set it back, or choose a new run_dir"
            )


def check_initial_weights(run: RunConfig, tokenizer_fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse `training.initial_weights` that are not there or do not fit, before a run begins.

    Args:
        shapes: of every parameter of the run's whole model, by global name.

    Raises:
        UserError: naming what is wrong.
    """
    path = Path(str(run.training.initial_weights))
    named = f"training.initial_weights {path}"
    facts = initial_weights_facts(path)
    _check_tokenizer(named, facts, run, tokenizer_fingerprint)
    saved_model = _saved_model(facts)
    for key in SAME_FUNCTION:
        ours, saved = getattr(run.model, key), saved_model[key]
        if ours != saved:
            raise UserError(f"model.{key} is {ours}, but {named} has {saved}; set model.{key} to {saved}")
    stored = own_shapes(path, facts, run)
    if unknown := sorted(stored.keys() - shapes.keys()):
        raise UserError(
            f"{named} holds {unknown[0]}, which a model with this configuration does not have (it was written with "
            f"model.attention {saved_model['attention']}); set the keys of model that it was trained with"
        )
    if lacking := sorted(name for name in shapes.keys() - stored.keys() if not name.endswith(DRAWN)):
        raise UserError(
            f"{named} lacks {lacking[0]}, which a model with this configuration has; set the keys of model that the weights "
            "were trained with"
        )
    for name, shape in sorted(stored.items()):
        if shape != shapes[name]:
            raise UserError(f"{named}: {name} is {list(shape)} there, but {list(shapes[name])} in this model")


def own_shapes(path: Path, facts: Mapping[str, Any], run: RunConfig) -> dict[str, tuple[int, ...]]:
    """`stored_shapes` of what means the same in this run: gates and memory tokens of another attention do not, by whatever
    name."""
    stored = stored_shapes(path)
    if _saved_model(facts)["attention"] == run.model.attention:
        return stored
    return {name: shape for name, shape in stored.items() if not name.endswith(DRAWN)}


def initial_weights_facts(path: Path) -> dict[str, Any]:
    """What stands beside the weights at `training.initial_weights`: a weights file, or a checkpoint's folder.

    Raises:
        UserError: there are none.
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
    """Shape of every weight of a weights file or a checkpoint's folder, by global name."""
    if path.suffix == SUFFIX:
        return read_weights_shapes(path)
    prefix = "model."
    described = describe_tensors(path)
    found = {name.removeprefix(prefix): tuple(entry.size) for name, entry in described.items() if name.startswith(prefix)}
    return join_block_shapes(found)


def join_block_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of whole matrices, of which a checkpoint holds the fused ones block by block along the first dimension."""
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole = block_of(name)[0]
        before = joined.get(whole, (0, *shape[1:]))
        joined[whole] = (before[0] + shape[0], *shape[1:]) if whole != name else shape
    return joined


def block_of(name: str) -> tuple[str, int]:
    """A fused matrix (SwiGLU's gate and up) lies in a checkpoint as NAME.0 and NAME.1: its name, and the block's number."""
    block = re.fullmatch(r"(.*\.weight)\.(\d+)", name)
    return (block[1], int(block[2])) if block else (name, 0)


def _saved_model(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`model` of the run that wrote the facts; a key that is newer than they had its default."""
    return {**asdict(ModelConfig()), **facts["config"]["model"]}


def _check_tokenizer(named: str, facts: Mapping[str, Any], run: RunConfig, tokenizer_fingerprint: str) -> None:
    if facts["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise UserError(
            f"{named} was trained with tokenizer {facts['tokenizer_fingerprint'][:12]}, but data.path {run.data.path} holds "
            f"{tokenizer_fingerprint[:12]}; use data that was prepared with that tokenizer (data.tokenizer)"
        )
