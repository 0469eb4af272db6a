"""Megatron-core's parallel linear layers, with PyTorch's own matrix product when the tensor-parallel size is 1.

Megatron-core's product runs Python code in the forward and the backward, and an autograd function for communication even when
there is none. It takes the host several times as long as PyTorch's product, and with small models the GPU waits for the host.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional


class ColumnLinear(ColumnParallelLinear):
    """Linear layer whose output features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply [T, B, h] -> [T, B, features of this rank]; the second result is None for no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None


class RowLinear(RowParallelLinear):
    """Linear layer whose input features are split over the tensor-parallel group."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply [T, B, features of this rank] -> [T, B, h]; the second result is None for no bias."""
        if self.tp_group.size() > 1 or self.bias is not None:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None
