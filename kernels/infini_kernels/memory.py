"""Compressive memory of one layer, which a stream carries from segment to segment (arXiv 2404.07143, Section 2.1).

Shapes: B batch, G key/value heads, D key width, Dv value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """Associative memory M and its normaliser z, for each row and key/value head.

    The type is float32 for any type of keys and values, because a float16 `z` overflows after a few dozen segments of 2048
    tokens. It is float64 only with float64 queries, keys and values, for verification.
    """

    M: Tensor  # [B, G, D, Dv]
    z: Tensor  # [B, G, D]

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        num_query_groups: int,
        key_width: int,
        value_width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "MemoryState":
        """Return the empty memory M_0 = 0, z_0 = 0, with which every document begins."""
        return cls(
            torch.zeros(batch_size, num_query_groups, key_width, value_width, device=device, dtype=dtype),
            torch.zeros(batch_size, num_query_groups, key_width, device=device, dtype=dtype),
        )

    def detach(self) -> "MemoryState":
        """Return the same values without their graph, for the start of a window of truncated back-propagation."""
        return MemoryState(self.M.detach(), self.z.detach())


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the memory for queries, keys and values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
