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
    num_groups, width = sigma_k_t.shape[2:4]
    identity = torch.eye(width, dtype=sigma_k_t.dtype, device=sigma_k_t.device)
    # Sorted by falling r, the segments that are not done are always the first ones, and the others cost nothing.
    left, order = repeats.long().cpu().flatten().sort(descending=True, stable=True)
    places = order.to(sigma_k_t.device)
    k_t, v, z, dz = (x.flatten(0, 1).index_select(0, places) for x in (sigma_k_t, written, entering_z, written_z))

    total, added = identity - removal(k_t, z, eps), v
    left, applied, exponent = left - 1, 1, 1
    done: list[tuple[Tensor, Tensor]] = []
    while True:
        active = int((left > 0).sum())
        done.append((total[active:], added[active:]))
        if active == 0:
            break
        left, total, added, k_t, v, z, dz = (x[:active] for x in (left, total, added, k_t, v, z, dz))
        count = left.clamp(max=1 << exponent)
        middle = (applied + (count - 1) / 2).to(z)[:, None, None]
        factor = identity - removal(k_t, z + middle * dz, eps)
        total, added = _apply(factor, v, count, exponent, total, added)
        left, applied, exponent = left - count, applied + (1 << exponent), exponent + 1

    back = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
    totals, additions = (torch.cat(parts[::-1]).index_select(0, back) for parts in zip(*done, strict=True))
    return (identity - totals).view(*repeats.shape, num_groups, width, width), additions.view_as(written)


def _apply(factor: Tensor, step: Tensor, count: Tensor, exponent: int, total: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The map M -> factor M + step, `count` times after M -> total M + added; all maps [segments, G, D, ...].

    count [segments] is 2^exponent for the first segments, for which that takes `exponent` squarings, and less for the others.
    """
    width = factor.shape[-1]
    full = int((count == 1 << exponent).sum())
    few, total_few, added_few = count[full:], total[full:], added[full:]
    for bit in range(exponent):
        taken = (few >> bit & 1).bool()
        if bool(taken.any()):
            here = taken.to(factor.device)[:, None, None, None]
            both = factor[full:] @ torch.cat((total_few, added_few), dim=-1)
            total_few = torch.where(here, both[..., :width], total_few)
            added_few = torch.where(here, both[..., width:] + step[full:], added_few)
        if bit == exponent - 1:
            factor, step = factor[:full], step[:full]
        both = factor @ torch.cat((factor, step), dim=-1)
        factor, step = both[..., :width], both[..., width:] + step
    both = factor @ torch.cat((total[:full], added[:full]), dim=-1)
    return torch.cat((both[..., :width], total_few)), torch.cat((both[..., width:] + step, added_few))
