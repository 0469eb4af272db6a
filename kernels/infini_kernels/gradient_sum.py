"""Sums of gradients over micro-batches: float32, whatever the type of a gradient."""

import torch
from torch import Tensor

from infini_kernels.backend import TRITON_USABLE

LARGE = 2**20
"""Numbers from which a pass less over them is worth a launch of Triton's, which takes the host several times as long."""


def add_to_sum(total: Tensor, gradient: Tensor) -> None:
    """total += gradient, converted to float32 without a copy of it.

    Args:
        total: float32, contiguous.
        gradient: as many numbers, of any floating type.
    """
    large = total.numel() >= LARGE and gradient.dtype != torch.float32
    if large and total.is_cuda and gradient.is_contiguous() and TRITON_USABLE:
        from infini_kernels.triton.gradient_sum import add_contiguous

        add_contiguous(total, gradient)
    else:
        total.add_(gradient.view_as(total))
