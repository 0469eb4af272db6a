"""Memory read, normalisation and mix with local attention in one pass over the tokens (arXiv 2404.07143, Eq. 3 and 10).

Shapes: B rows, T tokens, N segments, W tokens of a segment, H query heads, G key/value heads, R = H / G, D key width, Dv
value width. `tokens` [B, N] int32 is the number of valid (not padding) tokens of each segment. For `shift` see `features`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import (
    MOST_IN_32_BITS,
    block,
    blocks_of_a_program,
    by_token,
    cdiv,
    dot,
    dot_precision,
    halves,
    launch,
    load_state,
    on_hopper,
    rounded,
    tile,
)
from infini_kernels.triton.features import sigma
from infini_kernels.triton.operator import Operator
from infini_kernels.triton.read_backward import read_and_mix_backward, share_of_memory


@triton.jit
def _read_kernel(
    q_ptr, local_ptr, gate_ptr, state_ptr, z_ptr, tokens_ptr, shift_ptr, out_ptr,
    q_row, q_token, q_head, local_row, local_token, local_head, out_row, out_token,
    eps, T, N, H, R, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PER: tl.constexpr,
    LOCAL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = PRECISION == "bf16" or PRECISION == "emulated"
    program = tl.program_id(0)
    h = program % H
    n = (program // H) % N
    b = program // (H * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    d = tl.arange(0, BD)
    row, first, in_d = b.to(tl.int64), (n * W).to(tl.int64), d < D
    # Pointers to the segment's first token; offsets within a segment have 32 bits.
    q_ptr += row * q_row + first * q_token + h * q_head
    local_ptr += row * local_row + first * local_token + h * local_head
    out_ptr += row * out_row + first * out_token + h * DV
    place = (row * T + first) * H + h
    state = ((row * N + n) * (H // R) + h // R) * D
    z = tl.load(z_ptr + state + d, mask=in_d, other=0.0)
    share = share_of_memory(gate_ptr, z, h, LOCAL_ONLY)
    if BV >= DV:  # load the whole state once, for all tokens of the program
        memory = load_state(state_ptr, state, d, tl.arange(0, BV), D, DV)
        if HALVES:
            memory, low = halves(memory)
    for piece in range(0, PER):
        w = (tl.program_id(1) * PER + piece) * BW + tl.arange(0, BW)
        here, inside = w < tokens, (w < W) & (n * W + w < T)
        mask = here[:, None] & in_d[None, :]
        query = tl.load(q_ptr + (w[:, None] * q_token + d[None, :]), mask=mask, other=0.0)
        s = tl.where(mask, sigma(query, shift_ptr, place + (w * H)[:, None], here[:, None]), 0.0)  # [BW, BD]
        s = rounded(s, PRECISION)  # round once for both sums, so that their quotient uses the same features
        scale = share / (tl.sum(s * z[None, :], axis=1) + eps)  # [BW]
        for start in range(0, DV, BV):
            e = start + tl.arange(0, BV)
            in_e = e < DV
            local = tl.load(local_ptr + (w[:, None] * local_token + e[None, :]), mask=here[:, None] & in_e[None, :], other=0.0)
            if BV < DV:
                memory = load_state(state_ptr, state, d, e, D, DV)
                if HALVES:
                    memory, low = halves(memory)
            read = dot(s, memory, None, PRECISION)
            if HALVES:
                read = dot(s, low, read, PRECISION)
            mixed = tl.where(here[:, None], read * scale[:, None] + (1 - share) * local.to(tl.float32), 0.0)
            tl.store(
                out_ptr + (w[:, None] * out_token + e[None, :]),
                mixed.to(out_ptr.dtype.element_ty),
                mask=inside[:, None] & in_e[None, :],
            )


@Operator
def read_and_mix(
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    width: int,
    local_only: bool,
    eps: float,
    shift: Tensor | None = None,
) -> Tensor:
    """Read the memory and mix it with local attention.

    Args:
        q: [B, T, H, D].
        local: A_dot [B, T, H, Dv].
        gate: [H].
        M: M that enters each segment, [B, N, G, D, Dv].
        z: z that enters each segment, [B, N, G, D].
        tokens: [B, N] int32.
        width: W.
        local_only: leave A_dot unscaled where the memory is empty.
        eps: ε.
        shift: [B, T, H]; None for ELU + 1.

    Returns:
        [B, T, H, Dv] in A_dot's type, zero at padding. Rows and tokens have the same memory order as in q.
    """
    out = _output(q, local, width)
    _read_and_mix(q, local, gate, M, z, tokens, width, local_only, eps, shift, out)
    return out


@torch.library.custom_op("infini_kernels::read_and_mix_in_place", mutates_args=("local",))
def read_and_mix_in_place(
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    width: int,
    local_only: bool,
    eps: float,
    shift: Tensor | None = None,
) -> None:
    """Run `read_and_mix` with the result in A_dot, which must be contiguous.

    It has no gradient, because the gradient would need the original A_dot.
    """
    _read_and_mix(q, local, gate, M, z, tokens, width, local_only, eps, shift, local)


@read_and_mix_in_place.register_fake
def _(
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    width: int,
    local_only: bool,
    eps: float,
    shift: Tensor | None = None,
) -> None:
    return None


def _output(q: Tensor, local: Tensor, width: int) -> Tensor:
    """Allocate the output.

    In a layer, the rows of a micro-batch are inside its tokens. The output keeps that order, because the next layer would
    copy it otherwise.
    """
    B, T, H, DV = local.shape
    if q.stride(0) < q.stride(1) and (width - 1) * B * H * DV + DV <= MOST_IN_32_BITS:
        return torch.empty((T, B, H, DV), dtype=local.dtype, device=local.device).transpose(0, 1)
    return torch.empty(local.shape, dtype=local.dtype, device=local.device)


def _read_and_mix(
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    width: int,
    local_only: bool,
    eps: float,
    shift: Tensor | None,
    out: Tensor,
) -> None:
    (B, N), (_, T, H, D), DV = tokens.shape, q.shape, local.shape[-1]
    (q, q_strides), (local, local_strides) = by_token(q, width), by_token(local, width)
    BW, BV, warps, stages = tile(D, q.dtype, plain=shift is None)
    if q.dtype == torch.bfloat16 and D <= 128 and on_hopper(q):
        warps = 4  # two programs run at the same time on a multiprocessor
    BW, BV = block(width, BW), block(DV, BV)
    per = blocks_of_a_program(width, BW, B * N * H, warps) if BV >= DV else 1
    launch(
        _read_kernel, (B * N * H, cdiv(width, BW * per)),
        q, local, gate.contiguous(), M.contiguous(), z.contiguous(), tokens, shift, out, *q_strides, *local_strides,
        out.stride(0), out.stride(1), eps, T, N, H, H // M.shape[2], W=width, D=D, DV=DV, BW=BW, BD=block(D), BV=BV, PER=per,
        LOCAL_ONLY=local_only, PRECISION=dot_precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip


@read_and_mix.register_fake
def _(
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    width: int,
    local_only: bool,
    eps: float,
    shift: Tensor | None = None,
) -> Tensor:
    return _output(q, local, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.width, ctx.local_only, ctx.eps, shift = inputs
    ctx.save_for_backward(*tensors, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = read_and_mix_backward(grad, *ctx.saved_tensors, ctx.width, ctx.local_only, ctx.eps)
    return *gradients, None, None, None, None, None


read_and_mix.register_autograd(_backward, setup_context=_save)
