"""The compressive memory of one layer: what a stream carries from segment to segment (arXiv 2404.07143, Section 2.1).

Shapes: B batch, G key/value heads, D key width, Dv value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """Associative memory and its normaliser, one of each per row and key/value head.

    float32 whatever the type of keys and values (a float16 `z` overflows after a few dozen segments of 2048 tokens);
    float64 only beside float64 queries, keys and values, for verification.
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
        """The empty memory M_0 = 0, z_0 = 0 with which every document begins."""
        return cls(
            torch.zeros(batch_size, num_query_groups, key_width, value_width, device=device, dtype=dtype),
            torch.zeros(batch_size, num_query_groups, key_width, device=device, dtype=dtype),
        )

    def detach(self) -> "MemoryState":
        """The same values, cut from the graph: the start of a window of truncated back-propagation."""
        return MemoryState(self.M.detach(), self.z.detach())


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a memory beside queries, keys and values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
