"""Memory ageing: a segment's update counts as if the segment had come several times in a row.

In training, gradients then see a memory as diluted as that of a very long stream, at the cost of a short one. Not part of
the paper.

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
"""Number of equal applications from which a series needs fewer products than repeated squaring."""


class Removals(Protocol):
    """Removal of the delta rule in X segments, I - T = σ(K)^T diag(1 / (σ(K) z + ε)) σ(K).

    z is the normaliser that enters the segment.
    """

    def removal(self, z: Tensor, eps: float) -> Tensor:
        """Return the removal [X, G, D, D] for z [X, G, D]."""
        ...

    def removals(self, z: Tensor, dz: Tensor, times: list[Tensor], eps: float) -> list[Tensor]:
        """Return the removals for several normalisers z + t Δz.

        Args:
            z: [X, G, D].
            dz: Δz [X, G, D].
            times: t [n] for the first n segments, for each of the normalisers; n is X in the first and never rises.
            eps: ε.

        Returns:
            For each entry of times, [n, G, D, D].
        """
        ...


class PlainRemovals:
    """`Removals` in PyTorch operations.

    Args:
        sigma_k_t: σ(K)^T [X, G, D, W], zero at padding.
        strength: strength of each write [X, G, 1, W]; None for 1.
    """

    def __init__(self, sigma_k_t: Tensor, strength: Tensor | None = None) -> None:
        self._sigma_k_t, self._strength = sigma_k_t, strength

    def removal(self, z: Tensor, eps: float) -> Tensor:
        return self._grams(z.unsqueeze(-2) @ self._sigma_k_t + eps)[0]

    def removals(self, z: Tensor, dz: Tensor, times: list[Tensor], eps: float) -> list[Tensor]:
        # Multiply with the keys once instead of once per entry of times.
        at_z, at_dz = (x.unsqueeze(-2) @ self._sigma_k_t for x in (z, dz))  # [X, G, 1, W]
        return self._grams(*(at_z[: len(t)] + t[:, None, None, None] * at_dz[: len(t)] + eps for t in times))

    def _grams(self, *normalisers: Tensor) -> list[Tensor]:
        scales = [x.reciprocal() if self._strength is None else self._strength[: len(x)] / x for x in normalisers]
        return list(WeightedGrams.apply(self._sigma_k_t, *scales))


class Updates(Protocol):
    """Subset of `compressive.SegmentUpdates` that ageing needs."""

    written: Tensor
    z: Tensor

    def select(self, places: Tensor | None) -> Removals: ...


def repeated_removal(updates: Updates, entering_z: Tensor, repeats: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Apply the delta rule r times with the same keys and values, M <- (I - removed) M + added.

    Application j sees the normaliser z + j Δz. The applications are grouped into runs of 1, 2, 4, ... that share the
    normaliser of their middle, which is exact for r of 1 and 2. A run of c applications after j others removes at most c /
    (j + (c - 1) / 2) times the content of the memory. From c = 8 on that is less than once, so that the series of
    `map_series` is valid, and log(r) products suffice.

    Args:
        updates: σ(K)^T V and Δz of one application.
        entering_z: z that enters each segment, [B, N, G, D].
        repeats: r, [B, N] whole numbers of at least 1.
        eps: ε.

    Returns:
        removed [B, N, G, D, D] and added [B, N, G, D, Dv] of all r applications together.
    """
    num_groups, width = entering_z.shape[2:]
    # Sorted by falling r, the unfinished segments always come first, and finished segments cost nothing.
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
