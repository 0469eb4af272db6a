"""Variants that are not in the paper: learned write strength, corrected normaliser of the delta rule, softmax feature map.

All are off by default.

Shapes: B batch, T tokens, G key/value heads, D key width, Dv value width. Any batch dimensions come first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_kernels.memory import MemoryState

NORMALISERS = ("paper", "corrected")
FEATURE_MAPS = ("elu", "softmax")


def sharp_features(x: Tensor) -> Tensor:
    """Return softmax(2 x) over the last dimension, as in Hedgehog (arXiv 2402.04347) but without features of -x.

    ELU + 1 is linear for large x, so that a memory gives many facts almost the same weight. Here the weight of a key grows
    exponentially with its match to the query.
    """
    return (2 * x).softmax(dim=-1)


def write_strength(k: Tensor, write_gate: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return 2 sigmoid(K u), between 0 and 2: the strength with which each token's key and value are written.

    k [B, T, G, D], write_gate u [G, D] -> [B, T, G, 1] in `dtype`. It is 1 everywhere for u = 0. None without a gate.
    """
    if write_gate is None:
        return None
    # Autograd saves the copy, as for v: if q, k and v are views of one tensor, the copy lets that tensor be freed.
    return 2 * (k.to(dtype).contiguous() * write_gate.to(dtype)).sum(dim=-1, keepdim=True).sigmoid()


def remembered_values(v: Tensor, normaliser: str) -> Tensor:
    """Return the values that the memory stores: [..., Dv], or [..., Dv + 1] with a column of ones for 'corrected'."""
    return v if normaliser == "paper" else F.pad(v, (0, 1), value=1.0)


def read_state(memory: MemoryState, normaliser: str) -> MemoryState:
    """Return the M and z for a read, σ(Q) M / (σ(Q) z + ε).

    The paper divides by the sum of all keys ever written. Under the delta rule, M does not grow when a value is written
    again, but that sum does: a value that is written twice reads as half of itself. 'corrected' divides by the result of
    the same rule for values of 1, so that the weights of a read sum to one however often something was written.
    """
    return memory if normaliser == "paper" else MemoryState(memory.M[..., :-1], memory.M[..., -1])
