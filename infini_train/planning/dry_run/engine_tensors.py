"""The tensors of a running engine by kind, found where DeepSpeed keeps them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.deepspeed.optimizer_state import stepped_tensors


def weight_tensors(engine: Engine) -> Iterator[Tensor]:
    """Weights that the layers compute with, and ZeRO-3's slices of them."""
    for parameter in engine.module.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Master weights, where ZeRO keeps them apart from the weights, and moments."""
    masters = stepped_tensors(engine)
    if engine.run.layout.zero_stage:
        yield from masters
    for tensor in masters:
        yield from (value for value in engine.adamw.state[tensor].values() if value.dim())


def gradient_tensors(engine: Engine) -> Iterator[Tensor]:
    """Gradients of the step so far."""
    yield from (parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None)
    zero = engine.deepspeed.optimizer
    yield from getattr(zero, "fp32_groups_gradients_flat", [])  # bfloat16
    for kept in ("averaged_gradients", "all_grad_tensors"):  # ZeRO 1 and 2
        for group in (getattr(zero, kept, None) or {}).values():
            yield from group or []
    flat = getattr(zero, "grad_partitions_flat_buffer", None)  # ZeRO-3
    if flat is not None:
        yield flat
