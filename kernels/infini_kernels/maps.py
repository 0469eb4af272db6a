"""Affine maps that are applied many times, for segments whose update counts many times (see `ageing`).

Shapes: X segments, G key/value heads, D key width, Dv value width. A map M -> A M + a is two tensors, [X G, D, D] and [X G,
D, Dv].
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Maps(NamedTuple):
    """Affine map M -> A M + a of each segment and head, or the gradients of such maps."""

    factor: Tensor  # A [X G, D, D]
    added: Tensor  # a [X G, D, Dv]

    def at(self, rows: Tensor | slice) -> "Maps":
        return Maps(self.factor[rows], self.added[rows])

    def first(self, number: int) -> "Maps":
        return self.at(slice(number))

    def put(self, rows: Tensor | slice, maps: "Maps") -> None:
        for x, y in zip(self, maps, strict=True):
            x[rows] = y

    def copy(self) -> "Maps":
        return Maps(self.factor.clone(), self.added.clone())

    def after(self, earlier: "Maps") -> "Maps":
        """Return the composition M -> A (B M + b) + a.

        The products do the additions too: on small matrices, each extra pass costs as much as a product.
        """
        return Maps(torch.bmm(self.factor, earlier.factor), torch.baddbmm(self.added, self.factor, earlier.added))

    def earlier_gradient(self, gradient: "Maps") -> "Maps":
        """Return the gradient of `earlier` in `after`: A^T G and A^T g."""
        factor = self.factor.transpose(1, 2)
        return Maps(torch.bmm(factor, gradient.factor), torch.bmm(factor, gradient.added))


def later_factor_gradient(earlier: Maps, gradient: Maps) -> Tensor:
    """Return the gradient of A in `later.after(earlier)`, G B^T + g b^T. The gradient of a is g."""
    factor = torch.bmm(gradient.factor, earlier.factor.transpose(1, 2))
    return factor.baddbmm_(gradient.added, earlier.added.transpose(1, 2))


def identity_minus(removed: Tensor) -> Tensor:
    """Return I - removed for each segment and head."""
    factor = removed.neg()
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    return factor


class Run(Protocol):
    """Repeated application of M -> (I - removed) M + added, as often as counts says.

    counts has one number of at least 1 per segment, and they never rise.
    """

    def __init__(self, counts: list[int], heads: int) -> None: ...

    def forward(self, removed: Tensor, added: Tensor, total: Maps) -> list[Tensor]:
        """Apply the run after `total`, in place.

        Returns:
            The tensors that the backward needs.
        """
        ...

    def backward(self, saved: list[Tensor], of_total: Maps) -> Maps:
        """Replace the gradient of the new `total` by that of the old one, in place.

        Returns:
            The gradients of removed and added.
        """
        ...


class RunsOfMaps(torch.autograd.Function):
    """Runs of equal maps, one after another: run e applies M -> (I - removed_e) M + added as often as counts_e says.

    It is one node of the autograd graph, instead of several for each product.

    Args:
        added: [X, G, D, Dv], the same in all runs.
        counts: for each run a list with one number of at least 1 per segment, which never rise. No run has more segments
            than the previous one, so that the segments with fewer runs come last. In the first run all counts are 1.
        kinds: implementation of each run except the first.
        removed: for each run [X_e, G, D, D].

    Returns:
        A [X, G, D, D] and a [X, G, D, Dv] of all runs together.
    """

    @staticmethod
    def forward(
        ctx: Any, added: Tensor, counts: list[list[int]], kinds: list[type[Run]], *removed: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, constant = added.shape[1], added.flatten(0, 1)
        total = Maps(identity_minus(removed[0].flatten(0, 1)), constant.clone())
        ctx.runs = [kind(numbers, heads) for kind, numbers in zip(kinds, counts[1:], strict=True)]
        saved = [
            run.forward(taken.flatten(0, 1), constant[: len(taken) * heads], total.first(len(taken) * heads))
            for run, taken in zip(ctx.runs, removed[1:], strict=True)
        ]
        ctx.save_for_backward(*(tensor for tensors in saved for tensor in tensors))
        ctx.sizes = [len(tensors) for tensors in saved]
        return total.factor.unflatten(0, (-1, heads)), total.added.unflatten(0, (-1, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads = gradients[0].shape[1]
        saved = list(ctx.saved_tensors)  # read once: under checkpointing a second access fails
        of_total = Maps(*(x.flatten(0, 1).clone(memory_format=torch.contiguous_format) for x in gradients))
        of_added = torch.zeros_like(of_total.added)
        of_removed: list[Tensor] = []
        for run, size in zip(reversed(ctx.runs), reversed(ctx.sizes), strict=True):
            tensors, saved = saved[len(saved) - size :], saved[: len(saved) - size]
            of_run = run.backward(tensors, of_total.first(len(tensors[0])))
            of_added[: len(of_run.added)] += of_run.added
            of_removed.append(of_run.factor.unflatten(0, (-1, heads)))
        of_removed.append(of_total.factor.neg_().unflatten(0, (-1, heads)))
        return of_added.add_(of_total.added).unflatten(0, (-1, heads)), None, None, *reversed(of_removed)
