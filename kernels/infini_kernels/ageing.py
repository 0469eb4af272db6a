"""Memory ageing: a segment's update counts as if the segment had come several times in a row.

In training it shows the gradient a memory as diluted as that of a very long stream, at the cost of a short one. Not part of the
paper.

Shapes: B batch, N segments, W tokens of a segment, G key/value heads, D key width, Dv value width.
"""

from typing import Protocol

import torch
from torch import Tensor

from infini_kernels.backward import WeightedGrams
from infini_kernels.map_powers import Squares
from infini_kernels.map_series import Series
from infini_kernels.maps import RunsOfMaps
from infini_kernels.segments import to_device

SERIES_FROM = 8
"""Equal applications from which on a series takes fewer products than squares."""


class Removals(Protocol):
    """The delta rule's removal in X segments, I - T = σ(K)^T diag(1 / (σ(K) z + ε)) σ(K) for a normaliser z that enters."""

    def removal(self, z: Tensor, eps: float) -> Tensor:
        """z [X, G, D] -> [X, G, D, D]."""
        ...

    def removals(self, z: Tensor, dz: Tensor, times: list[Tensor], eps: float) -> list[Tensor]:
        """For each of several z + t Δz, of all segments and then of ever fewer: t [n] for the first n -> [n, G, D, D]."""
        ...


class PlainRemovals:
    """`Removals` in PyTorch's own operations.

    sigma_k_t [X, G, D, W], zero at padding; strength [X, G, 1, W] of each write, None for 1
    """

    def __init__(self, sigma_k_t: Tensor, strength: Tensor | None = None) -> None:
        self._sigma_k_t, self._strength = sigma_k_t, strength

    def removal(self, z: Tensor, eps: float) -> Tensor:
        return self._grams(z.unsqueeze(-2) @ self._sigma_k_t + eps)[0]

    def removals(self, z: Tensor, dz: Tensor, times: list[Tensor], eps: float) -> list[Tensor]:
        # Products with the keys once, and not for each time.
        at_z, at_dz = (x.unsqueeze(-2) @ self._sigma_k_t for x in (z, dz))  # [X, G, 1, W]
        return self._grams(*(at_z[: len(t)] + t[:, None, None, None] * at_dz[: len(t)] + eps for t in times))

    def _grams(self, *normalisers: Tensor) -> list[Tensor]:
        scales = [x.reciprocal() if self._strength is None else self._strength[: len(x)] / x for x in normalisers]
        return list(WeightedGrams.apply(self._sigma_k_t, *scales))


class Updates(Protocol):
    """The parts of `compressive.SegmentUpdates` that are needed here."""

    written: Tensor
    z: Tensor

    def select(self, places: Tensor | None) -> Removals: ...


def repeated_removal(updates: Updates, entering_z: Tensor, repeats: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The delta rule applied r times with the same keys and values, M <- (I - removed) M + added.

    Application j sees the normaliser z + j Δz. The applications are walked in runs of 1, 2, 4, ... that share the normaliser at
    their middle: exact for r of 1 and 2. A run of c applications after j others removes at most c / (j + (c - 1) / 2) times
    what is there, with c = 8 and more less than once: the series of `map_series` holds for it, and log(r) products suffice.

    Args:
        updates: σ(K)^T V and Δz of one application.
        entering_z: z that enters each segment, [B, N, G, D].
        repeats: r, [B, N] whole numbers of at least 1.

    Returns:
        removed [B, N, G, D, D] and added [B, N, G, D, Dv] of all r applications together.
    """
    num_groups, width = entering_z.shape[2:]
    # Sorted by falling r, the segments that are not done are always the first ones, and the others cost nothing.
    left, order = repeats.long().cpu().flatten().sort(descending=True, stable=True)
    places = to_device(order, entering_z.device)
    v, z, dz = (x.flatten(0, 1).index_select(0, places) for x in (updates.written, entering_z, updates.z))

    counts: list[list[int]] = []
    middles: list[Tensor] = []
    while len(left):
        applied = (1 << len(counts)) - 1
        count = left.clamp(max=applied + 1)
        counts.append(count.tolist())
        middles.append(to_device(applied + (count - 1) / 2, z.device).to(z.dtype))
        left = (left - count)[left > count]
    removed = updates.select(places).removals(z, dz, middles, eps)
    kinds = [Series if run[0] >= SERIES_FROM else Squares for run in counts[1:]]
    factors, added = RunsOfMaps.apply(v, counts, kinds, *removed)

    back = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=places.device))
    identity = torch.eye(width, dtype=v.dtype, device=v.device)
    taken = (identity - factors).index_select(0, back).view(*repeats.shape, num_groups, width, width)
    return taken, added.index_select(0, back).view_as(updates.written)
