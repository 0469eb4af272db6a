"""Recurrence over a micro-batch's segments, the only sequential computation of the memory.

Shapes: B batch, N segments, G key/value heads, D key width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_kernels.arguments import values_known


def walk(state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute state_s = state_{s-1} - removed_s state_{s-1} + added_s; the state is zeroed before a segment with a reset.

    Args:
        state: state that enters the first segment, [B, G, D, ...].
        added: [B, N, G, D, ...], in the type of state.
        reset: [B, N] bool; None for no resets.
        removed: [B, N, G, D, D]; None for zeros.

    Returns:
        The state that enters each segment [B, N, G, D, ...], and the state after the last [B, G, D, ...].
    """
    entering, leaving = _Walk.apply(state, added, reset, removed)
    return entering, leaving


class _Walk(torch.autograd.Function):
    """One node of the autograd graph instead of several per segment, which would cost more than the sums if segments are
    short."""

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
        # segments[s + 1] is the gradient of the state after s, which is also the gradient of added_s.
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
    """Split reset [B, N] into one mask per segment, [B, 1, ...] with the dimensions of a state; None for no reset.

    On a GPU every segment has a mask: to know the values, the host would have to wait for the device.
    """
    masks = reset.view(*reset.shape, *[1] * (state.dim() - 1)).unbind(1)
    needed = reset.any(dim=0).tolist() if values_known(reset) else [True] * len(masks)
    return [mask if need else None for mask, need in zip(masks, needed, strict=True)]
