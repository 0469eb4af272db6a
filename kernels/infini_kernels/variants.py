"""What is not in the paper: a learned strength of each write, a normaliser that suits the delta rule, sharper features.

All are off unless asked for.

Shapes: B batch, T tokens, G key/value heads, D key width, Dv value width; before them any batch dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_kernels.memory import MemoryState

NORMALISERS = ("paper", "corrected")
FEATURE_MAPS = ("elu", "softmax")


def sharp_features(x: Tensor) -> Tensor:
    """softmax(2 x) over the last dimension, as in Hedgehog (arXiv 2402.04347) but without features of -x.

    ELU + 1 is linear in what is large, so that a memory weighs many facts almost alike; here the weight of a key that fits
    grows exponentially with how well it fits.
    """
    return (2 * x).softmax(dim=-1)


def write_strength(k: Tensor, write_gate: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """2 sigmoid(K u), in 0 to 2: how much of each token's key and value is written.

    k [B, T, G, D], write_gate u [G, D] -> [B, T, G, 1] in `dtype`; 1 everywhere where u is 0. None without a gate.
    """
    if write_gate is None:
        return None
    # A copy is kept, as of v: where k is a part of one tensor with q and v, that lets theirs go.
    return 2 * (k.to(dtype).contiguous() * write_gate.to(dtype)).sum(dim=-1, keepdim=True).sigmoid()


def remembered_values(v: Tensor, normaliser: str) -> Tensor:
    """The values that the memory holds: [..., Dv], with a one behind them under 'corrected' [..., Dv + 1]."""
    return v if normaliser == "paper" else F.pad(v, (0, 1), value=1.0)


def read_state(memory: MemoryState, normaliser: str) -> MemoryState:
    """The M and z of a read, σ(Q) M / (σ(Q) z + ε).

    The paper divides by the sum of all keys ever written. Under the delta rule M does not grow with what it holds already, but
    that sum does: a value that is written twice reads as half of itself. 'corrected' divides by what the same rule made of
    values of one, so that the weights of a read sum to one, however often something was written.
    """
    return memory if normaliser == "paper" else MemoryState(memory.M[..., :-1], memory.M[..., -1])
