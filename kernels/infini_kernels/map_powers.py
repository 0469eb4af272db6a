"""Affine maps that are applied many times, for a segment whose update counts many times (`ageing`).

Shapes: X segments, G key/value heads, D key width, Dv value width. A map M -> A M + a is two tensors, [X G, D, D] and
[X G, D, Dv].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.segments import to_device


class Maps(NamedTuple):
    """M -> A M + a of each segment and head; or the gradients of such."""

    factor: Tensor  # A [X G, D, D]
    added: Tensor  # a [X G, D, Dv]

    def first(self, number: int) -> "Maps":
        return Maps(self.factor[:number], self.added[:number])

    def at(self, rows: Tensor | slice) -> "Maps":
        return Maps(self.factor[rows], self.added[rows])

    def after(self, earlier: "Maps") -> "Maps":
        """M -> A (B M + b) + a."""
        return Maps(torch.bmm(self.factor, earlier.factor), torch.baddbmm(self.added, self.factor, earlier.added))

    def of_earlier(self, gradient: "Maps") -> "Maps":
        """Gradient of `earlier` in `after`: A^T G and A^T g."""
        factor = self.factor.transpose(1, 2)
        return Maps(torch.bmm(factor, gradient.factor), torch.bmm(factor, gradient.added))


class RunsOfMaps(torch.autograd.Function):
    """Runs of equal maps, one run after the other: run e is M -> (I - removed_e) M + added, as often as counts_e says.

    One node of the graph and not some for each of up to log2(count)^2 / 2 squarings, and sums left to the products: on small
    matrices the rest costs as much as the products.

    Args:
        added: [X, G, D, Dv], the same in all runs.
        counts: for each run a list of whole numbers of at least 1, one a segment, none larger than the one before it. A run has
            no more segments than the run before, so those whose runs end sooner stand last. All of the first run are 1.
        removed: for each run [X_e, G, D, D].

    Returns:
        A [X, G, D, D] and a [X, G, D, Dv] of all runs together.
    """

    @staticmethod
    def forward(ctx: Any, added: Tensor, counts: list[list[int]], *removed: Tensor) -> tuple[Tensor, Tensor]:
        heads, constant = added.shape[1], added.flatten(0, 1)
        total = Maps(_kept(removed[0]), constant.clone())
        saved: list[Tensor] = []
        for numbers, taken in zip(counts[1:], removed[1:], strict=True):
            power = Maps(_kept(taken), constant[: len(numbers) * heads])
            for bit in _bits(numbers, heads, added.device):
                if bit.number:
                    power = power.first(bit.size).after(power.first(bit.size))
                saved += power
                if bit.rows is not None:
                    before = Maps(*(x.clone() for x in total.at(bit.rows)))
                    saved += before
                    for x, y in zip(total, power.at(bit.rows).after(before), strict=True):
                        x[bit.rows] = y
        ctx.save_for_backward(*saved)
        ctx.counts = counts
        return total.factor.unflatten(0, (-1, heads)), total.added.unflatten(0, (-1, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads = gradients[0].shape[1]
        saved = list(ctx.saved_tensors)  # once: a checkpoint gives them a single time
        of_total = Maps(*(x.flatten(0, 1).clone(memory_format=torch.contiguous_format) for x in gradients))
        of_added = torch.zeros_like(of_total.added)
        of_removed: list[Tensor] = []
        for numbers in reversed(ctx.counts[1:]):
            of_power: Maps | None = None
            for bit in reversed(list(_bits(numbers, heads, of_added.device))):
                before = None if bit.rows is None else Maps(saved.pop(-2), saved.pop())
                power = Maps(saved.pop(-2), saved.pop())
                of_power = _of_squared(power, of_power)
                if before is not None:
                    of_after = of_total.at(bit.rows)
                    _add_of_later(of_power, bit.rows, before, of_after)
                    for x, y in zip(of_total, power.at(bit.rows).of_earlier(of_after), strict=True):
                        x[bit.rows] = y
            assert of_power is not None
            of_added[: len(of_power.added)] += of_power.added
            of_removed.append(of_power.factor.neg_().unflatten(0, (-1, heads)))
        of_removed.append(of_total.factor.neg_().unflatten(0, (-1, heads)))
        return of_added.add_(of_total.added).unflatten(0, (-1, heads)), None, *reversed(of_removed)


def _kept(removed: Tensor) -> Tensor:
    """I - removed, of each segment and head."""
    kept = removed.neg().flatten(0, 1)
    kept.diagonal(dim1=-2, dim2=-1).add_(1)
    return kept


class _Bit(NamedTuple):
    """A binary digit of the counts of a run."""

    number: int
    size: int  # the first rows, whose counts have this digit or a higher one
    rows: slice | Tensor | None  # those that have this digit


def _bits(counts: list[int], heads: int, device: torch.device) -> Iterator[_Bit]:
    for number in range(counts[0].bit_length()):
        size = sum(count >> number > 0 for count in counts)
        places = [x for x in range(size) if counts[x] >> number & 1]
        rows: slice | Tensor | None = None
        if places and places[-1] - places[0] == len(places) - 1:
            rows = slice(places[0] * heads, (places[-1] + 1) * heads)
        elif places:
            rows = to_device(torch.tensor([x * heads + head for x in places for head in range(heads)]), device)
        yield _Bit(number, size * heads, rows)


def _of_squared(power: Maps, gradient: Maps | None) -> Maps:
    """Gradient of a power from that of its square, which has been taken of the first segments only.

    dA = G A^T + A^T G + g a^T, da = g + A^T g
    """
    if gradient is None:
        return Maps(torch.zeros_like(power.factor), torch.zeros_like(power.added))
    number = len(gradient.factor)
    factor, added = power.first(number)
    result = Maps(torch.empty_like(power.factor), torch.empty_like(power.added))
    for x in result:
        x[number:] = 0
    torch.bmm(gradient.factor, factor.transpose(1, 2), out=result.factor[:number])
    result.factor[:number].baddbmm_(factor.transpose(1, 2), gradient.factor).baddbmm_(gradient.added, added.transpose(1, 2))
    torch.baddbmm(gradient.added, factor.transpose(1, 2), gradient.added, out=result.added[:number])
    return result


def _add_of_later(of_power: Maps, rows: slice | Tensor, before: Maps, gradient: Maps) -> None:
    """Adds the gradient of `later` in `later.after(before)`: dA = G B^T + g b^T, da = g."""
    products = (gradient.factor, before.factor.transpose(1, 2)), (gradient.added, before.added.transpose(1, 2))
    if isinstance(rows, slice):
        of_power.factor[rows].baddbmm_(*products[0]).baddbmm_(*products[1])
        of_power.added[rows] += gradient.added
    else:
        of_power.factor.index_add_(0, rows, torch.bmm(*products[0]).baddbmm_(*products[1]))
        of_power.added.index_add_(0, rows, gradient.added)
