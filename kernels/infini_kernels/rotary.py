"""Rotary position embedding of the local attention (arXiv 2104.09864), halves rotated as in Llama."""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of every head.

    x [..., T, heads, D]; cos and sin [T, D/2]. Computed in the wider of the two types, returned in x's.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [T, 1, D/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
