"""Diagnostics of memory reads and writes: retrieval accuracy of a written value, and write strength per token."""

from __future__ import annotations

import torch
from torch import Tensor

from infini_kernels import MemoryState
from infini_kernels.compressive import sigma
from infini_kernels.variants import read_state, write_strength


def read_back_cosine(
    k: Tensor, v: Tensor, memory: MemoryState, eps: float, normaliser: str = "paper", feature_map: str = "elu"
) -> Tensor:
    """Compare each value with the memory's answer to its own key.

    The result is the cosine between the value and σ(K) M / (σ(K) z + ε): Eq. 3 of the paper with the key as query.

    Args:
        k: [B, T, G, D], not rotated, as written to the memory.
        v: [B, T, G, Dv].
        memory: M [B, G, D, Dv], z [B, G, D]; M [B, G, D, Dv + 1] for a corrected normaliser.

    Returns:
        [B, T, G] in the memory's dtype; 0 where the memory is empty.
    """
    memory = read_state(memory, normaliser)
    sigma_k = sigma(k, memory.M.dtype, feature_map)
    read = torch.einsum("btgd,bgde->btge", sigma_k, memory.M)
    read = read / (torch.einsum("btgd,bgd->btg", sigma_k, memory.z) + eps).unsqueeze(-1)
    return torch.nn.functional.cosine_similarity(read, v.to(read.dtype), dim=-1)


def strength_of_writes(k: Tensor, write_gate: Tensor) -> Tensor:
    """Return the learned write strength of each token: k [B, T, G, D], u [G, D] -> [B, T, G]."""
    strength = write_strength(k, write_gate, torch.float32)
    assert strength is not None
    return strength.squeeze(-1)
