"""Powers of affine maps, for a segment whose update counts many times (`ageing`).

Shapes: X segments, G key/value heads, D key width, Dv value width. A map M -> A M + a is one tensor [A | a] of D x (D + Dv).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.segments import to_device


class MapPowers(torch.autograd.Function):
    """The map `step` applied `count` times after the map `total`, by repeated squaring.

    step and total [X, G, D, D + Dv]; counts [X] on the CPU, each at least 1, none larger than the one before. One node of the
    graph and not a few for each of up to log2(count) squarings: on small matrices those cost as much as the products.
    """

    @staticmethod
    def forward(ctx: Any, step: Tensor, total: Tensor, counts: Tensor) -> Tensor:
        numbers = counts.tolist()
        power, result = step.contiguous(), total.clone(memory_format=torch.contiguous_format)
        powers, places, befores = [], [], []
        for bit in range(numbers[0].bit_length()):
            if bit:
                # Counts fall, so those that need a higher power are always the first ones.
                power = power[: sum(number >> bit > 0 for number in numbers)]
                power = _after(power, power)
            here = _Places([x for x in range(len(power)) if numbers[x] >> bit & 1], power.device)
            before = here.of(result).clone()  # `put` writes to result
            if here:
                here.put(result, _after(here.of(power), before))
            powers.append(power)
            places.append(here)
            befores.append(before)
        ctx.save_for_backward(*powers, *befores)
        ctx.places = places
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        bits, saved = len(ctx.places), ctx.saved_tensors  # once: a checkpoint gives them a single time
        powers, befores = saved[:bits], saved[bits:]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        of_power = torch.zeros_like(powers[-1])
        for bit in reversed(range(bits)):
            here: _Places = ctx.places[bit]
            if here:
                after = here.of(gradient)
                of_later, of_earlier = _after_backward(here.of(powers[bit]), befores[bit], after)
                here.add(of_power, of_later)
                here.put(gradient, of_earlier)
            if bit:
                squared = powers[bit - 1][: len(of_power)]
                of_later, of_earlier = _after_backward(squared, squared, of_power)
                of_power = torch.zeros_like(powers[bit - 1])
                torch.add(of_later, of_earlier, out=of_power[: len(squared)])
        return of_power, gradient, None


class _Places:
    """Some of the segments: rows of a tensor [X, ...]."""

    def __init__(self, rows: list[int], device: torch.device) -> None:
        self._first = len(rows) if rows == list(range(len(rows))) else None
        self._rows = to_device(torch.tensor(rows), device) if self._first is None else None

    def __bool__(self) -> bool:
        return self._first != 0

    def of(self, x: Tensor) -> Tensor:
        return x[: self._first] if self._rows is None else x.index_select(0, self._rows)

    def put(self, x: Tensor, value: Tensor) -> None:
        if self._rows is None:
            x[: self._first] = value
        else:
            x.index_copy_(0, self._rows, value)

    def add(self, x: Tensor, value: Tensor) -> None:
        if self._rows is None:
            x[: self._first] += value
        else:
            x.index_add_(0, self._rows, value)


def _after(later: Tensor, earlier: Tensor) -> Tensor:
    """[A B | A b + a], the map M -> A (B M + b) + a, of [A | a] and [B | b]."""
    width = later.shape[-2]
    both = later[..., :width] @ earlier
    both[..., width:] += later[..., width:]
    return both


def _after_backward(later: Tensor, earlier: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """With G = [G_B | G_b] for the gradient of the result: d[A | a] = [G [B | b]^T | G_b], d[B | b] = A^T G."""
    width = later.shape[-2]
    of_later = torch.cat((gradient @ earlier.transpose(-1, -2), gradient[..., width:]), dim=-1)
    return of_later, later[..., :width].transpose(-1, -2) @ gradient
