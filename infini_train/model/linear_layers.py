"""Megatron-core's parallel linear layers, with PyTorch's own product if nothing is split.

Megatron-core's product runs Python in both directions, with autograd functions for exchanges even if there is no exchange. The
host takes several times as long for it as for PyTorch's product, and with small models a GPU waits for its host.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional


class ColumnLinear(ColumnParallelLinear):
    """Linear layer whose output features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, h] -> [T, B, features of this process], and no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None


class RowLinear(RowParallelLinear):
    """Linear layer whose input features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, features of this process] -> [T, B, h], and no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None
