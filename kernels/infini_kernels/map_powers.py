"""Powers of affine maps by repeated squaring: exact, with one product of maps per binary digit of the count.

For shapes and names see `maps`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from infini_kernels.maps import Maps, identity_minus, later_factor_gradient
from infini_kernels.segments import to_device


class Squares:
    """`maps.Run` for any maps."""

    def __init__(self, counts: list[int], heads: int) -> None:
        self._counts, self._heads = counts, heads

    def forward(self, removed: Tensor, added: Tensor, total: Maps) -> list[Tensor]:
        saved: list[Tensor] = []
        power = Maps(identity_minus(removed), added)
        for bit in self._bits(added.device):
            if bit.number:
                power = power.first(bit.size).after(power.first(bit.size))
            saved += power
            if bit.rows is not None:
                before = total.at(bit.rows).copy()
                saved += before
                total.put(bit.rows, power.at(bit.rows).after(before))
        return saved

    def backward(self, saved: list[Tensor], of_total: Maps) -> Maps:
        of_power: Maps | None = None
        for bit in reversed(list(self._bits(of_total.added.device))):
            before = None if bit.rows is None else Maps(saved.pop(-2), saved.pop())
            power = Maps(saved.pop(-2), saved.pop())
            of_power = _of_squared(power, of_power)
            if bit.rows is not None and before is not None:
                after = of_total.at(bit.rows)
                _add(of_power, bit.rows, Maps(later_factor_gradient(before, after), after.added))
                of_total.put(bit.rows, power.at(bit.rows).earlier_gradient(after))
        assert of_power is not None
        return Maps(of_power.factor.neg_(), of_power.added)

    def _bits(self, device: torch.device) -> Iterator["_Bit"]:
        counts, heads = self._counts, self._heads
        for number in range(counts[0].bit_length()):
            # Counts never rise, so the segments that need a higher power always come first.
            size = sum(count >> number > 0 for count in counts)
            places = [x for x in range(size) if counts[x] >> number & 1]
            rows: slice | Tensor | None = None
            if places and places[-1] - places[0] == len(places) - 1:
                rows = slice(places[0] * heads, (places[-1] + 1) * heads)
            elif places:
                rows = to_device(torch.tensor([x * heads + head for x in places for head in range(heads)]), device)
            yield _Bit(number, size * heads, rows)


class _Bit(NamedTuple):
    """One binary digit of the counts."""

    number: int
    size: int  # number of first rows whose counts have this digit or a higher one
    rows: slice | Tensor | None  # rows whose count has a one at this digit


def _of_squared(power: Maps, gradient: Maps | None) -> Maps:
    """Return the gradient of a power from the gradient of its square, which was computed for the first rows only.

    dA = G A^T + g a^T + A^T G, da = g + A^T g
    """
    result = Maps(torch.zeros_like(power.factor), torch.zeros_like(power.added))
    if gradient is not None:
        size = len(gradient.factor)
        squared, transposed = power.first(size), power.factor[:size].transpose(1, 2)
        result.factor[:size] = later_factor_gradient(squared, gradient).baddbmm_(transposed, gradient.factor)
        result.added[:size] = torch.baddbmm(gradient.added, transposed, gradient.added)
    return result


def _add(maps: Maps, rows: slice | Tensor, more: Maps) -> None:
    for x, y in zip(maps, more, strict=True):
        if isinstance(rows, slice):
            x[rows] += y
        else:
            x.index_add_(0, rows, y)
