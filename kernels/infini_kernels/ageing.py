"""Memory ageing: a segment's update counts as if the segment had come several times in a row.

In training it shows the gradient a memory as diluted as that of a very long stream, at the cost of a short one. Not part of the
paper.

Shapes: B batch, N segments, W tokens of a segment, G key/value heads, D key width, Dv value width.
"""

import torch
from torch import Tensor

from infini_kernels.backward import WeightedGram


def removal(sigma_k_t: Tensor, z: Tensor, eps: float) -> Tensor:
    """I - T of one application of the delta rule: σ(K)^T diag(1 / (σ(K) z + ε)) σ(K).

    sigma_k_t [B, N, G, D, W]; z [B, N, G, D], the normaliser that enters -> [B, N, G, D, D].
    """
    scale = (z.unsqueeze(-2) @ sigma_k_t + eps).reciprocal()  # [B, N, G, 1, W]
    return WeightedGram.apply(sigma_k_t, scale)


def repeated_removal(
    sigma_k_t: Tensor, written: Tensor, entering_z: Tensor, written_z: Tensor, repeats: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The delta rule applied r times with the same keys and values, M <- (I - removed) M + added.

    Application j sees the normaliser z + j Δz. The applications are walked in runs of 1, 2, 4, ... that share the normaliser at
    their middle, and each run by repeated squaring: exact for r of 1 and 2, and log(r)^2 products of D x D otherwise.

    Args:
        sigma_k_t: [B, N, G, D, W], zero at padding.
        written: σ(K)^T V of one application, [B, N, G, D, Dv].
        entering_z: z that enters each segment, [B, N, G, D].
        written_z: Δz of one application, [B, N, G, D].
        repeats: r, [B, N] whole numbers of at least 1.

    Returns:
        removed [B, N, G, D, D] and added [B, N, G, D, Dv] of all r applications together.
    """
    identity = torch.eye(sigma_k_t.shape[-2], dtype=sigma_k_t.dtype, device=sigma_k_t.device)
    total, added = identity.expand(*sigma_k_t.shape[:3], -1, -1), torch.zeros_like(written)
    host = repeats.long().cpu()
    first, exponent = 0, 0
    while int((count := (host - first).clamp(0, 1 << exponent)).max()) > 0:
        middle = (first + (count - 1).clamp(min=0) / 2).to(entering_z)[:, :, None, None]
        factor, step = identity - removal(sigma_k_t, entering_z + middle * written_z, eps), written
        for bit in range(exponent + 1):
            taken = (count >> bit & 1).bool()
            if bool(taken.any()):
                here = taken.to(written.device)[:, :, None, None, None]
                total = torch.where(here, factor @ total, total)
                added = torch.where(here, factor @ added + step, added)
            if bit < exponent:
                step, factor = factor @ step + step, factor @ factor
        first += 1 << exponent
        exponent += 1
    return identity - total, added
