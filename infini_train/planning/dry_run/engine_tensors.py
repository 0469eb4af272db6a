"""Weights, gradients and optimizer tensors of an initialized engine, read from DeepSpeed's internal attributes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.deepspeed.optimizer_state import stepped_tensors


def weight_tensors(engine: Engine) -> Iterator[Tensor]:
    """Yield the weights that the layers compute with, and ZeRO-3's slices of them."""
    for parameter in engine.module.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Yield the moments, and the master weights if ZeRO stores them separately from the weights."""
    masters = stepped_tensors(engine)
    if engine.run.layout.zero_stage:
        yield from masters
    for tensor in masters:
        yield from (value for value in engine.adamw.state[tensor].values() if value.dim())


def gradient_tensors(engine: Engine) -> Iterator[Tensor]:
    """Yield the gradients that the current step has accumulated so far."""
    yield from (parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None)
    zero = engine.deepspeed.optimizer
    yield from getattr(zero, "fp32_groups_gradients_flat", [])  # bfloat16
    for kept in ("averaged_gradients", "all_grad_tensors"):  # ZeRO 1 and 2
        for group in (getattr(zero, kept, None) or {}).values():
            yield from group or []
    flat = getattr(zero, "grad_partitions_flat_buffer", None)  # ZeRO-3
    if flat is not None:
        yield flat
