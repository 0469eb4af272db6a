"""The state that a layer carries between micro-batches: for every variant a named tuple of tensors with a row dimension first.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

LayerMemory = tuple[Tensor, ...]
"""A NamedTuple of tensors, each [B, ...]: `infini_kernels.MemoryState` for Infini-attention, other fields for the baselines."""
Carried = TypeVar("Carried", bound=LayerMemory)


@dataclass(frozen=True)
class CarriedTensor:
    """One field of a layer's memory.

    Attributes:
        shape: shape for one row, over all heads.
        by_head: True if the first dimension of `shape` is key/value heads, which tensor parallelism splits.
        counter: True for an int64 counter; all other fields are float32.
    """

    shape: tuple[int, ...]
    by_head: bool = True
    counter: bool = False

    def zeros(self, rows: int, tensor_processes: int, device: torch.device | str | None) -> Tensor:
        """Return the zero-filled field for `rows` rows on one of the `tensor_processes` ranks that share its heads."""
        shape = list(self.shape)
        if self.by_head:
            shape[0] //= tensor_processes
        return torch.zeros(rows, *shape, dtype=torch.int64 if self.counter else torch.float32, device=device)


def numbers_carried(fields: dict[str, CarriedTensor]) -> int:
    """Count the values in one row's state over all heads, without counters."""
    return sum(prod(each.shape) for each in fields.values() if not each.counter)


def map_tensors(change: Callable[[Tensor], Tensor], memory: Carried) -> Carried:
    """Apply `change` to every tensor of a memory and return a named tuple of the same type."""
    return type(memory)(*map(change, memory))


def detached(memory: Carried) -> Carried:
    """Return the memory detached from the autograd graph."""
    return map_tensors(Tensor.detach, memory)
