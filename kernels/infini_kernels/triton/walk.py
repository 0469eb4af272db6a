"""Recurrence over the segments: `infini_kernels.recurrence` as one kernel.

Shapes: B rows, N segments, G key/value heads, D key width, Dv value width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import block, cdiv, launch, next_power_of_2
from infini_kernels.triton.operator import Operator

ELEMENTS = 1024
"""Number of elements of a state per program, in sums, where elements are independent."""


@triton.jit
def _sums_kernel(
    start_ptr, added_ptr, entering_ptr, leaving_ptr, z_start_ptr, z_added_ptr, z_entering_ptr, z_leaving_ptr, reset_ptr,
    N, E, E_Z, BLOCKS, BE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Compute running sums of N states of E numbers.

    Unless z_start_ptr is None, also of N states of E_Z numbers, by the programs from number BLOCKS on.
    """
    if tl.program_id(1) < BLOCKS:
        _running_sums(start_ptr, added_ptr, entering_ptr, leaving_ptr, reset_ptr, tl.program_id(1), N, E, BE, BACKWARD)
    elif z_start_ptr is not None:
        z_block = tl.program_id(1) - BLOCKS
        _running_sums(z_start_ptr, z_added_ptr, z_entering_ptr, z_leaving_ptr, reset_ptr, z_block, N, E_Z, BE, BACKWARD)


@triton.jit
def _running_sums(
    start_ptr, added_ptr, entering_ptr, leaving_ptr, reset_ptr, block, N, E, BE: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """Compute running sums that restart from zero at resets. BACKWARD computes the gradients, from the last segment
    backwards.

    The sums are compensated (Kahan): over ten thousand segments, rounding errors would add up to more than 1e-4.
    """
    b = tl.program_id(0).to(tl.int64)
    e = block * BE + tl.arange(0, BE)
    mask = e < E
    state = tl.load(start_ptr + b * E + e, mask=mask, other=0.0)
    lost = tl.zeros((BE,), tl.float32)
    for step in range(0, N):
        n = N - 1 - step if BACKWARD else step
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + b * N + n) != 0
        place = (b * N + n) * E + e
        if not BACKWARD and reset_ptr is not None:
            state, lost = tl.where(reset, 0.0, state), tl.where(reset, 0.0, lost)
        # Backward: the gradient of added_n is that of the state after n. Before n, add the gradient of n's read, or reset.
        tl.store(entering_ptr + place, state, mask=mask)
        more = tl.load(added_ptr + place, mask=mask, other=0.0) - lost
        total = state + more
        lost = (total - state) - more
        state = total
        if BACKWARD and reset_ptr is not None:
            state, lost = tl.where(reset, 0.0, state), tl.where(reset, 0.0, lost)
    tl.store(leaving_ptr + b * E + e, state, mask=mask)


@triton.jit
def _recurrence_kernel(
    start_ptr, added_ptr, removed_ptr, reset_ptr, entering_ptr, leaving_ptr, N, G,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute state <- (I - removed) state + added.

    BACKWARD uses the transposed matrices, from the last segment backwards.
    """
    program = tl.program_id(0)
    g = program % G
    b = (program // G).to(tl.int64)
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    mask = (d < D)[:, None] & (e < DV)[None, :]
    own = (b * G + g) * D * DV + d[:, None] * DV + e[None, :]
    state = tl.load(start_ptr + own, mask=mask, other=0.0)  # [BD, BV]
    for step in range(0, N):
        n = N - 1 - step if BACKWARD else step
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + b * N + n) != 0
        if not BACKWARD and reset_ptr is not None:
            state = tl.where(reset, 0.0, state)
        segment = (b * N + n) * G + g
        place = segment * D * DV + d[:, None] * DV + e[None, :]
        tl.store(entering_ptr + place, state, mask=mask)
        # The product reads the state in pieces of BK rows, from the global memory to which it has just been written.
        tl.debug_barrier()
        after = state + tl.load(added_ptr + place, mask=mask, other=0.0)
        for first in range(0, D, BK):
            j = first + tl.arange(0, BK)
            in_j = j < D
            at = d[:, None] + j[None, :] * D if BACKWARD else d[:, None] * D + j[None, :]
            matrix = tl.load(removed_ptr + segment * D * D + at, mask=(d < D)[:, None] & in_j[None, :], other=0.0)
            piece_at = segment * D * DV + j[:, None] * DV + e[None, :]
            piece = tl.load(entering_ptr + piece_at, mask=in_j[:, None] & (e < DV)[None, :], other=0.0)
            after -= tl.dot(matrix, piece, input_precision=PRECISION)
        tl.debug_barrier()
        state = after
        if BACKWARD and reset_ptr is not None:
            state = tl.where(reset, 0.0, state)
    tl.store(leaving_ptr + own, state, mask=mask)


@Operator
def walk_segments(
    start: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor]:
    """Run `recurrence.walk` in float32; with backward, compute its gradients from those of its results.

    Args:
        start: [B, G, D, ...], state that enters the first segment; backward: gradient of the state after the last.
        added: [B, N, G, D, ...]; backward: gradient of the state that enters each segment.
        reset: [B, N] int8 or None.
        removed: [B, N, G, D, D] or None.
        backward: compute the gradients.

    Returns:
        The state that enters each segment (backward: gradient of added), and the state after the last (backward: gradient
        of start).
    """
    B, N, G, D = added.shape[:4]
    start, added = start.contiguous(), added.contiguous()
    entering, leaving = torch.empty_like(added), torch.empty_like(start)
    if removed is None:
        _launch_sums((start, added, entering, leaving), (None,) * 4, reset, backward)
    else:
        DV = added.shape[-1]
        BV = block(DV, 16)
        BK = 16 if DV % 16 and D > 64 else 64  # unaligned rows need more registers
        launch(
            _recurrence_kernel, (B * G, cdiv(DV, BV)),
            start, added, removed.contiguous(), reset, entering, leaving, N, G,
            D=D, DV=DV, BD=block(D), BK=block(D, BK), BV=BV, BACKWARD=backward, PRECISION="tf32x3", num_warps=8,
        )  # fmt: skip
    return entering, leaving


def _launch_sums(states: tuple[Tensor, ...], z_states: tuple[Tensor | None, ...], reset: Tensor | None, backward: bool) -> None:
    """Launch the running sums of states and z_states.

    Each is four contiguous tensors: start, added, and the outputs entering and leaving.
    """
    B, N = states[1].shape[:2]
    E, E_Z = states[0][0].numel(), 0 if z_states[0] is None else z_states[0][0].numel()
    BE = min(ELEMENTS, next_power_of_2(E))
    blocks = cdiv(E, BE)
    launch(
        _sums_kernel, (B, blocks + cdiv(E_Z, BE)), *states, *z_states, reset, N, E, E_Z, blocks, BE=BE, BACKWARD=backward
    )  # fmt: skip


@walk_segments.register_fake
def _(start: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None, backward: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(added.shape, dtype=added.dtype, device=added.device),
        torch.empty(start.shape, dtype=start.dtype, device=start.device),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, reset, removed, ctx.is_backward = inputs
    ctx.save_for_backward(reset, removed, None if removed is None else output[0])


def _backward(ctx: Any, by_entering: Tensor, by_leaving: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative(ctx.is_backward)
    reset, removed, entering = ctx.saved_tensors
    dadded, dstart = walk_segments(by_leaving, by_entering, reset, removed, True)
    dremoved = None
    if removed is not None:
        left, right = dadded.flatten(0, 2), entering.flatten(0, 2).transpose(1, 2)
        dremoved = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=-1).view(removed.shape)
    return dstart, dadded, None, dremoved, None


def _refuse_second_derivative(is_backward: bool) -> None:
    """Refuse a second derivative.

    The backward calls the same operator with other matrices, and torch would use the forward's gradient for it.
    """
    if is_backward:
        raise RuntimeError("the kernels have no second derivative; write backend='reference' for one")


walk_segments.register_autograd(_backward, setup_context=_save)


@Operator
def walk_sums(
    M: Tensor, z: Tensor, added_M: Tensor, added_z: Tensor, reset: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `walk_segments` on M and z in one launch, for the linear rule.

    M, z and reset are as for `walk_segments`.

    Returns:
        M and z that enter each segment, then M and z after the last.
    """
    states, z_states = ((x.contiguous(), y.contiguous()) for x, y in ((M, added_M), (z, added_z)))
    entering_M, entering_z, leaving_M, leaving_z = _like(added_M, added_z, M, z)
    _launch_sums((*states, entering_M, leaving_M), (*z_states, entering_z, leaving_z), reset, backward)
    return entering_M, entering_z, leaving_M, leaving_z


def _like(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    return a, b, c, d


@walk_sums.register_fake
def _(
    M: Tensor, z: Tensor, added_M: Tensor, added_z: Tensor, reset: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(added_M, added_z, M, z)


def _save_reset(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.is_backward = inputs[5]
    ctx.save_for_backward(inputs[4])


def _sums_backward(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative(ctx.is_backward)
    by_entering_M, by_entering_z, by_leaving_M, by_leaving_z = by
    (reset,) = ctx.saved_tensors
    dadded_M, dadded_z, dM, dz = walk_sums(by_leaving_M, by_leaving_z, by_entering_M, by_entering_z, reset, True)
    return dM, dz, dadded_M, dadded_z, None, None


walk_sums.register_autograd(_sums_backward, setup_context=_save_reset)
