"""What a layer carries from micro-batch to micro-batch, whatever the variant: a named tuple of tensors, a row's part in each.

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
"""A NamedTuple of tensors, each [B, ...]: `infini_kernels.MemoryState` for Infini-attention, other fields for its rivals."""
Carried = TypeVar("Carried", bound=LayerMemory)


@dataclass(frozen=True)
class CarriedTensor:
    """One field of a layer's memory.

    Attributes:
        shape: of one row, over all heads.
        by_head: whether its first dimension is key/value heads, which tensor parallelism splits.
        counter: a whole number beside the state, int64; everything else is float32.
    """

    shape: tuple[int, ...]
    by_head: bool = True
    counter: bool = False

    def zeros(self, rows: int, tensor_processes: int, device: torch.device | str | None) -> Tensor:
        """The field of so many rows on one of the processes that share its heads."""
        shape = list(self.shape)
        if self.by_head:
            shape[0] //= tensor_processes
        return torch.zeros(rows, *shape, dtype=torch.int64 if self.counter else torch.float32, device=device)


def numbers_carried(fields: dict[str, CarriedTensor]) -> int:
    """Numbers of one row's state, over all heads; counters beside it are left out."""
    return sum(prod(each.shape) for each in fields.values() if not each.counter)


def map_tensors(change: Callable[[Tensor], Tensor], memory: Carried) -> Carried:
    """The same named tuple with every tensor changed."""
    return type(memory)(*map(change, memory))


def detached(memory: Carried) -> Carried:
    """The same values, cut from the graph."""
    return map_tensors(Tensor.detach, memory)
