"""Load only the weights, without optimizer, memory and streams: for evaluation and for training.initial_weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from infini_train.checkpoint import folder
from infini_train.checkpoint.checkpointer import find_damage
from infini_train.checkpoint.compatibility import ATTENTION_SUFFIXES, check_same_model, initial_weights_facts, usable_shapes
from infini_train.checkpoint.reader import read_tensors
from infini_train.checkpoint.tensors import collect_blocks, empty_like_parameter, optimizer_entries
from infini_train.checkpoint.weights_file import SUFFIX, read_weights, read_weights_facts
from infini_train.config import RunConfig
from infini_train.model.parameter_placement import ParameterPlacement, initial_value
from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.deepspeed.optimizer_state import write_optimizer_state
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError


@torch.no_grad()
def load_weights(
    path: Path, module: nn.Module, placements: Mapping[str, ParameterPlacement], run: RunConfig, tokenizer_fingerprint: str
) -> int:
    """Load the weights of a trained run into a module, in any layout. A collective over all ranks.

    Args:
        path: a checkpoint folder, or a weights file.
        placements: placements of the module's parameters, by name.

    Returns:
        The checkpoint's step.

    Raises:
        UserError: the checkpoint belongs to another model or tokenizer.
    """
    facts = read_weights_facts(path) if path.suffix == SUFFIX else folder.read_state_file(path)
    check_same_model(facts, path, run, tokenizer_fingerprint)
    weights = _read(path, module, placements)
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])
    return facts["step"]


def load_initial_weights(run: RunConfig, engine: Engine, placements: Mapping[str, ParameterPlacement]) -> str:
    """Load `training.initial_weights` into a run before its first step. A collective over all ranks.

    Weights load into the float32 master weights without rounding. Attention parameters that they lack start as in a new model.

    Returns:
        One line for the user: source, step, and parameters that start as in a new model.

    Raises:
        UserError: the checkpoint is damaged.
    """
    path = Path(str(run.training.initial_weights))
    facts = initial_weights_facts(path)
    if path.suffix != SUFFIX and (wrong := find_damage(path)):
        raise UserError(f"training.initial_weights {path} is damaged: {'; '.join(wrong)}; name another checkpoint")
    stored = usable_shapes(path, facts, run)
    known = {name: placement for name, placement in placements.items() if placement.name in stored}
    weights = _read(path, engine.module, known)
    drawn = {name: placement for name, placement in placements.items() if name not in known}
    for name, placement in drawn.items():
        assert placement.name.endswith(ATTENTION_SUFFIXES), placement.name
        weights[name] = placement.slice(initial_value(placement, run.model, run.training.seed)).to(platform.device())
    write_optimizer_state(engine, {"model": weights}, steps_taken=0)
    new = Counter(re.sub(r".*\.", "", placement.name) for placement in drawn.values())
    words = ", ".join(f"{name} ({count})" for name, count in sorted(new.items()))
    return f"starting from {path}, step {facts['step']}" + (f"; as in a new model: {words}" if new else "")


def _read(path: Path, module: nn.Module, placements: Mapping[str, ParameterPlacement]) -> dict[str, Tensor]:
    """Read this rank's float32 slices of the parameters in `placements`, by name in the module."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in placements}
    if path.suffix == SUFFIX:
        names = {placements[name].name: name for name in parameters}
        return {
            names[global_name]: placements[names[global_name]].slice(whole).to(platform.device(), torch.float32)
            for global_name, whole in read_weights(path, names)
        }
    weights = {name: empty_like_parameter(parameter) for name, parameter in parameters.items()}
    entries = optimizer_entries(placements, {"model": weights})
    read_tensors(path, entries)
    collect_blocks(placements, entries, {"model": weights})
    return weights
