"""Powers of affine maps that change little in all, by a short series instead of repeated squaring.

c applications of M -> (I - R) M + a add S a, where, with Y = c R,

    S = sum over i < c of (I - R)^i = c phi(Y),   phi(y) = (1 - (1 - y/c)^c) / y,

and the factor of M is I - R S. For eigenvalues of Y in [0, 1], phi is interpolated between its values at the Chebyshev
nodes of that interval, accurate to the rounding of the number type. The number of products does not depend on c.

For shapes and names see `maps`.
"""

import math

import torch
from torch import Tensor

from infini_kernels.maps import Maps, later_factor_gradient
from infini_kernels.segments import to_device

BLOCKS = {torch.float32: 2, torch.float64: 3}
"""Degree of the series divided by three. At degree 6 the error of phi is below 3e-9, at degree 9 below 5e-14."""


class Series:
    """`maps.Run` for maps whose `removed`, multiplied by its count, has eigenvalues between 0 and 1."""

    def __init__(self, counts: list[int], heads: int) -> None:
        self._counts, self._heads = counts, heads

    def forward(self, removed: Tensor, added: Tensor, total: Maps) -> list[Tensor]:
        count, c = self._coefficients(removed)
        y = count * removed
        y2 = torch.bmm(y, y)
        y3 = torch.bmm(y2, y)
        partials: list[Tensor] = []  # Horner's rule in y3
        for i in range(len(c) - 4, -1, -3):
            if partials:
                partial = torch.baddbmm(c[i + 2] * y2, partials[-1], y3)
            else:
                partial = torch.mul(c[i + 3], y3).addcmul_(c[i + 2], y2)
            partial.addcmul_(c[i + 1], y).diagonal(dim1=-2, dim2=-1).add_(c[i].squeeze(-1))
            partials.append(partial)
        series = partials[-1]
        run = Maps(torch.bmm(removed, series).neg_(), torch.bmm(series, added))
        run.factor.diagonal(dim1=-2, dim2=-1).add_(1)
        before = total.copy()
        total.put(slice(None), run.after(before))
        return [removed, added, count, c, y2, y3, *partials, run.factor, *before]

    def backward(self, saved: list[Tensor], of_total: Maps) -> Maps:
        removed, added, count, c, y2, y3, *partials, factor, before_factor, before_added = saved
        of_factor, of_run_added = later_factor_gradient(Maps(before_factor, before_added), of_total), of_total.added.clone()
        of_total.put(slice(None), Maps(factor, added).earlier_gradient(of_total))
        series_t, removed_t = partials[-1].transpose(1, 2), removed.transpose(1, 2)
        of_added = torch.bmm(series_t, of_run_added)
        of_removed = torch.bmm(of_factor, series_t).neg_()
        of_partial = torch.bmm(of_run_added, added.transpose(1, 2)).baddbmm_(removed_t, of_factor, alpha=-1)
        of_y, of_y2 = c[1] * of_partial, c[2] * of_partial
        of_y3 = torch.zeros_like(of_y)
        for i, later in zip(range(4, len(c), 3), reversed(partials[:-1]), strict=True):
            of_y3.baddbmm_(later.transpose(1, 2), of_partial)
            of_partial = torch.bmm(of_partial, y3.transpose(1, 2))
            of_y.addcmul_(c[i], of_partial)
            of_y2.addcmul_(c[i + 1], of_partial)
        of_y3.addcmul_(c[-1], of_partial)
        y = count * removed
        y_t = y.transpose(1, 2)
        of_y2.baddbmm_(of_y3, y_t)
        of_y.baddbmm_(y2.transpose(1, 2), of_y3).baddbmm_(of_y2, y_t).baddbmm_(y_t, of_y2)
        return Maps(of_removed.addcmul_(count, of_y), of_added)

    def _coefficients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return c [X G, 1, 1], and the coefficients of c phi for 1, Y, Y^2, ... [degree + 1, X G, 1, 1]."""
        degree = 3 * BLOCKS[like.dtype]
        nodes = (1 + torch.cos((2 * torch.arange(degree + 1, dtype=torch.float64) + 1) * math.pi / (2 * degree + 2))) / 2
        count = torch.tensor(self._counts, dtype=torch.float64)
        values = -count * torch.expm1(count * torch.log1p(-nodes[:, None] / count)) / nodes[:, None]  # [degree + 1, X]
        coefficients = torch.linalg.solve(torch.linalg.vander(nodes), values)
        both = torch.cat((count[None], coefficients)).to(like.dtype).repeat_interleave(self._heads, dim=1)
        count, *_ = both = to_device(both[..., None, None], like.device)
        return count, both[1:]
