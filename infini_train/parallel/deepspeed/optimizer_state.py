"""Float32 master weights and Adam moments by parameter, for every ZeRO stage.

ZeRO stores them as flat partitions over the data-parallel group. This module converts them to whole tensors of this rank's
tensor-parallel slice. A checkpoint can then use the model's parameter names, and a run with another ZeRO stage or
data-parallel size can load it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from infini_train.parallel.deepspeed.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def stepped_tensors(engine: Engine) -> list[Tensor]:
    """Return the tensors that AdamW updates: parameters, or ZeRO's flat partitions of them."""
    if engine.run.layout.zero_stage == 3:
        return list(engine.deepspeed.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.adamw.param_groups for parameter in group["params"]]


def initialize_moments(engine: Engine) -> None:
    """Create the AdamW state that its first step would create.

    ZeRO links parameters to the optimizer state during the first step, when only the first parameter group has a state. It
    would never find the moments of the other groups.
    """
    for tensor in stepped_tensors(engine):
        device = tensor.device if engine.adamw.defaults["fused"] else torch.device("cpu")
        engine.adamw.state[tensor] = {
            "step": torch.tensor(0.0, device=device),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    if engine.run.layout.zero_stage in (1, 2):
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def read_optimizer_state(engine: Engine, keep: Container[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Copy this rank's slice of the optimizer state to host memory. This is a collective over the data-parallel group.

    Args:
        keep: parameter names to return; None returns all. Other parameters are gathered too, and freed one by one.

    Returns:
        Tensors by kind ("model", "exp_avg", "exp_avg_sq") and by parameter name in the module.
    """
    state: dict[str, dict[str, Tensor]] = {"model": {}, **{moment: {} for moment in MOMENTS}}
    for name, parameter in engine.module.named_parameters():
        for kind, tensors in state.items():
            value = _whole(engine, parameter, kind)
            if keep is None or name in keep:
                tensors[name] = value.detach().to("cpu", torch.float32, copy=True)
    return state


def _whole(engine: Engine, parameter: torch.nn.Parameter, kind: str) -> Tensor:
    if engine.run.layout.zero_stage == 0:
        return parameter if kind == "model" else engine.adamw.state[parameter][kind]
    if kind == "model":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def write_optimizer_state(engine: Engine, state: dict[str, dict[str, Tensor]], steps_taken: int) -> None:
    """Write an optimizer state in the format of `read_optimizer_state`.

    Args:
        state: the kinds to write, of the three; the others stay unchanged.
        steps_taken: number of optimizer steps that led to this state, for Adam's bias correction.
    """
    for tensor in stepped_tensors(engine):
        engine.adamw.state[tensor]["step"].fill_(steps_taken)
    zero = engine.deepspeed.optimizer
    for name, parameter in engine.module.named_parameters():
        if engine.run.layout.zero_stage == 3:
            _write_zero3(zero, parameter, {kind: tensors[name] for kind, tensors in state.items()})
            continue
        for kind, tensors in state.items():
            if kind == "model":
                parameter.copy_(tensors[name])
                if engine.run.layout.zero_stage:
                    safe_set_full_fp32_param(parameter, tensors[name])
            elif engine.run.layout.zero_stage == 0:
                engine.adamw.state[parameter][kind].copy_(tensors[name])
            else:
                safe_set_full_optimizer_state(parameter, tensors[name], kind)


def _write_zero3(zero: Any, parameter: Any, values: dict[str, Tensor]) -> None:
    """Write this rank's slice of a ZeRO-3 parameter. DeepSpeed's own setter fails if the last slice is padded."""
    for kind, value in values.items():
        key = None if kind == "model" else kind
        partition, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        start = partition.numel() * zero._get_param_partition_rank(parameter)
        share = value.flatten()[start : start + partition.numel()]
        partition[: share.numel()].copy_(share)
        if key is None:
            parameter.ds_tensor.data[: share.numel()].copy_(share)
