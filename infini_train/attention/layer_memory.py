"""Memory that a layer carries from micro-batch to micro-batch: a named tuple of tensors, each with one entry per row.

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
"""A NamedTuple of tensors, each [B, ...]: `infini_kernels.MemoryState` for Infini-attention."""
Carried = TypeVar("Carried", bound=LayerMemory)


@dataclass(frozen=True)
class CarriedTensor:
    """One field of a layer's memory.

    Attributes:
        shape: of one row, over all heads.
        by_head: whether the first dimension is key/value heads, which tensor parallelism splits.
        counter: whether it is an int64 counter; other fields are float32.
    """

    shape: tuple[int, ...]
    by_head: bool = True
    counter: bool = False

    def zeros(self, rows: int, tensor_processes: int, device: torch.device | str | None) -> Tensor:
        """Return the empty field of some rows, on one of the processes that share its heads."""
        shape = list(self.shape)
        if self.by_head:
            shape[0] //= tensor_processes
        return torch.zeros(rows, *shape, dtype=torch.int64 if self.counter else torch.float32, device=device)


def numbers_carried(fields: dict[str, CarriedTensor]) -> int:
    """Return how many numbers one row carries over all heads, without counters."""
    return sum(prod(each.shape) for each in fields.values() if not each.counter)


def map_tensors(change: Callable[[Tensor], Tensor], memory: Carried) -> Carried:
    """Return the named tuple with a function applied to every tensor."""
    return type(memory)(*map(change, memory))


def detached(memory: Carried) -> Carried:
    """Return the memory detached from the autograd graph."""
    return map_tensors(Tensor.detach, memory)
