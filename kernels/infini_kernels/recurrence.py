"""The walk over a micro-batch's segments, the only part of the memory that has to go one segment after the other.

Shapes: B batch, N segments, G key/value heads, D key width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.arguments import values_known


def walk(state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """state_s = state_{s-1} - removed_s state_{s-1} + added_s, from zero where a reset stands before s.

    state [B, G, D, ...]; added [B, N, G, D, ...] of its type; reset [B, N] bool; removed [B, N, G, D, D] -> what enters each
    segment [B, N, G, D, ...], and what leaves the last [B, G, D, ...].
    """
    entering, leaving = _Walk.apply(state, added, reset, removed)
    return entering, leaving


class _Walk(torch.autograd.Function):
    """One node in the graph in place of a few for each segment: with short segments those cost more than the sums."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None) -> tuple[Tensor, Tensor]:
        entering = torch.empty_like(added, memory_format=torch.contiguous_format)
        leaving = torch.empty_like(added[:, 0], memory_format=torch.contiguous_format)
        masks = [None] * added.shape[1] if reset is None else _masks(reset, leaving)
        segments = [*entering.unbind(1), leaving]
        segments[0].copy_(state)
        for s, addition in enumerate(added.unbind(1)):
            if (mask := masks[s]) is not None:
                segments[s].masked_fill_(mask, 0)
            if removed is not None:
                addition = addition - removed[:, s] @ segments[s]
            torch.add(segments[s], addition, out=segments[s + 1])
        ctx.save_for_backward(reset, removed, None if removed is None else entering)
        return entering, leaving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        reset, removed, entering = ctx.saved_tensors
        by_entering, by_leaving = gradients
        removed_gradient = None if removed is None else torch.empty_like(removed)
        added_gradient = torch.empty_like(by_entering, memory_format=torch.contiguous_format)
        state_gradient = torch.empty_like(by_leaving, memory_format=torch.contiguous_format)
        masks = [None] * by_entering.shape[1] if reset is None else _masks(reset, state_gradient)
        # segments[s + 1] is the gradient of what leaves s, and with that of what s adds.
        segments = [state_gradient, *added_gradient.unbind(1)]
        segments[-1].copy_(by_leaving)
        for s in reversed(range(len(segments) - 1)):
            after, before = segments[s + 1], segments[s]
            torch.add(after, by_entering[:, s], out=before)
            if removed_gradient is not None:
                torch.matmul(after, entering[:, s].transpose(-1, -2), out=removed_gradient[:, s])
                before.sub_(removed[:, s].transpose(-1, -2) @ after)
            if (mask := masks[s]) is not None:
                before.masked_fill_(mask, 0)
        return state_gradient, added_gradient, None, None if removed_gradient is None else removed_gradient.neg_()


def _masks(reset: Tensor, state: Tensor) -> list[Tensor | None]:
    """reset [B, N] -> for each segment [B, 1, ...], as wide as a state has dimensions, or None where nothing resets.

    On a GPU that is not looked at: to know it the host would have to wait for the device.
    """
    masks = reset.view(*reset.shape, *[1] * (state.dim() - 1)).unbind(1)
    needed = reset.any(dim=0).tolist() if values_known(reset) else [True] * len(masks)
    return [mask if need else None for mask, need in zip(masks, needed, strict=True)]
