"""Megatron-core's parallel matrices, and PyTorch's own product where nothing is split.

Megatron-core's product is Python in both directions, with an autograd function around it for an exchange even where there is
none. The host takes several times as long for it as for PyTorch's, and in small models it is the host that a GPU waits for.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional


class ColumnLinear(ColumnParallelLinear):
    """Output features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, h] -> [T, B, features of this process], and no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None


class RowLinear(RowParallelLinear):
    """Input features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, features of this process] -> [T, B, h], and no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None
