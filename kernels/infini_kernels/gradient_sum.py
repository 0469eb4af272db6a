"""Sum of gradients over micro-batches, in float32 for any type of gradient."""

import torch
from torch import Tensor

from infini_kernels.backend import TRITON_USABLE

LARGE = 2**20
"""Number of elements from which one pass less is worth a Triton launch.

The host time of a Triton launch is several times that of a PyTorch call.
"""


def add_to_sum(total: Tensor, gradient: Tensor) -> None:
    """Add a gradient to its sum, total += gradient, without a float32 copy of the gradient.

    Args:
        total: float32, contiguous.
        gradient: the same number of elements, of any floating type.
    """
    large = total.numel() >= LARGE and gradient.dtype != torch.float32
    if large and total.is_cuda and gradient.is_contiguous() and TRITON_USABLE:
        from infini_kernels.triton.gradient_sum import add_contiguous

        add_contiguous(total, gradient)
    else:
        total.add_(gradient.view_as(total))
