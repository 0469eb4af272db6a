"""Backward of `read`: one pass over the tokens if a program can hold a whole state and its gradient, otherwise two.

Shapes: B rows, T tokens, N segments, W tokens of a segment, H query heads, G key/value heads, R = H / G, D key width, Dv
value width. `tokens` [B, N] int32 is the number of valid (not padding) tokens of each segment. For `shift` see `features`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import (
    Tile,
    block,
    blocks_of_a_program,
    by_token,
    cdiv,
    dot,
    dot_precision,
    high_half,
    launch,
    load_state,
    on_hopper,
    sum_tile,
    tile,
)
from infini_kernels.triton.features import sigma, sigma_backward
from infini_kernels.triton.operator import Operator

TILE_OF_ONE_PASS = Tile(32, 128, 8, 3)
"""Tile of the single pass, which needs the registers of a Hopper GPU and heads of at most 128 columns."""


@triton.jit
def share_of_memory(gate_ptr, z, h, LOCAL_ONLY: tl.constexpr):
    """Return the memory's share in head h: sigmoid(β), and 0 under LOCAL_ONLY if the memory is empty."""
    share = tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
    if LOCAL_ONLY:
        share = tl.where(tl.max(tl.abs(z), axis=0) > 0, share, 0.0)
    return share


@triton.jit
def _read_backward_kernel(
    q_ptr, local_ptr, gate_ptr, state_ptr, z_ptr, tokens_ptr, shift_ptr, grad_ptr,
    dq_ptr, dlocal_ptr, dshare_ptr, dstate_ptr, dz_ptr, scale_ptr, dnorm_ptr,
    q_row, q_token, q_head, local_row, local_token, local_head, grad_row, grad_token, grad_head,
    eps, T, N, H, R, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PER: tl.constexpr,
    ONE_PASS: tl.constexpr, LOCAL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of queries, A_dot and the memory's share.

    With ONE_PASS also compute the gradients of states, for each head and program. Otherwise store scale and dnorm for
    `_read_backward_states_kernel`.
    """
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
    grad_ptr += row * grad_row + first * grad_token + h * grad_head
    out = (row * T + first) * H + h
    dq_ptr += out * D
    dlocal_ptr += out * DV
    state = ((row * N + n) * (H // R) + h // R) * D
    z = tl.load(z_ptr + state + d, mask=in_d, other=0.0)
    share = share_of_memory(gate_ptr, z, h, LOCAL_ONLY)
    if BV >= DV:  # load the whole state once, for all tokens of the program
        memory = high_half(load_state(state_ptr, state, d, tl.arange(0, BV), D, DV), PRECISION)
    if ONE_PASS:
        dstate = tl.zeros((BD, BV), tl.float32)
        dz = tl.zeros((BD,), tl.float32)
    dshare = tl.zeros((BW,), tl.float32)
    for piece in range(0, PER):
        w = (tl.program_id(1) * PER + piece) * BW + tl.arange(0, BW)
        here, inside = w < tokens, (w < W) & (n * W + w < T)
        mask = here[:, None] & in_d[None, :]
        query = tl.load(q_ptr + (w[:, None] * q_token + d[None, :]), mask=mask, other=0.0)
        s = tl.where(mask, sigma(query, shift_ptr, out + (w * H)[:, None], here[:, None]), 0.0)  # [BW, BD]
        norm = tl.sum(s * z[None, :], axis=1) + eps  # [BW]
        scale = tl.where(here, share / norm, 0.0)
        by_read = tl.zeros((BW, BD), tl.float32)  # Σ_e g M
        local_grad = tl.zeros((BW,), tl.float32)  # Σ_e g A_dot
        for start in range(0, DV, BV):
            e = start + tl.arange(0, BV)
            wide = here[:, None] & (e < DV)[None, :]
            grad = tl.load(grad_ptr + (w[:, None] * grad_token + e[None, :]), mask=wide, other=0.0)
            local = tl.load(local_ptr + (w[:, None] * local_token + e[None, :]), mask=wide, other=0.0).to(tl.float32)
            if BV < DV:
                memory = high_half(load_state(state_ptr, state, d, e, D, DV), PRECISION)
            by_read = dot(grad, tl.trans(memory), by_read, PRECISION)
            if ONE_PASS:
                dstate = dot(tl.trans(s * scale[:, None]), grad, dstate, PRECISION)
            local_grad += tl.sum(local * grad.to(tl.float32), axis=1)
            dlocal = ((1 - share) * grad.to(tl.float32)).to(dlocal_ptr.dtype.element_ty)
            tl.store(dlocal_ptr + ((w * (H * DV))[:, None] + e[None, :]), dlocal, mask=inside[:, None] & (e < DV)[None, :])
        read_grad = tl.sum(s * by_read, axis=1)  # Σ_e g σ(q) M
        dnorm = -scale * read_grad / norm
        dshare += tl.where(here, read_grad / norm - local_grad, 0.0)
        dquery = sigma_backward(by_read * scale[:, None] + dnorm[:, None] * z[None, :], s, shift_ptr)
        dquery = tl.where(mask, dquery, 0.0).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + ((w * (H * D))[:, None] + d[None, :]), dquery, mask=inside[:, None] & in_d[None, :])
        if ONE_PASS:
            dz += tl.sum(s * dnorm[:, None], axis=0)
        else:
            tl.store(scale_ptr + (out + w * H), scale, mask=inside)
            tl.store(dnorm_ptr + (out + w * H), dnorm, mask=inside)
    slot = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if ONE_PASS:
        e = tl.arange(0, BV)
        at = dstate_ptr + slot * D * DV + (d[:, None] * DV + e[None, :])
        tl.store(at, dstate, mask=in_d[:, None] & (e < DV)[None, :])
        tl.store(dz_ptr + slot * D + d, dz, mask=in_d)
    # Under LOCAL_ONLY the share of a first segment is 0, and so is its gradient.
    tl.store(dshare_ptr + slot, tl.sum(dshare, axis=0) * share * (1 - share))


@triton.jit
def _read_backward_states_kernel(
    q_ptr, tokens_ptr, shift_ptr, grad_ptr, scale_ptr, dnorm_ptr, dstate_ptr, dz_ptr,
    q_row, q_token, q_head, grad_row, grad_token, grad_head,
    T, N, H, R: tl.constexpr, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment, d_block, v_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G = H // R
    g = segment % G
    n = (segment // G) % N
    b = segment // (G * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    row = b.to(tl.int64)
    d = d_block * BD + tl.arange(0, BD)
    e = v_block * BV + tl.arange(0, BV)
    in_d, in_e = d < D, e < DV
    dstate = tl.zeros((BD, BV), tl.float32)
    dz = tl.zeros((BD,), tl.float32)
    BLOCKS: tl.constexpr = (W + BW - 1) // BW
    for step in range(0, R * BLOCKS):  # one loop over heads and tokens, so that the compiler can pipeline it
        h = g * R + step // BLOCKS
        w = (step % BLOCKS) * BW + tl.arange(0, BW)
        here = w < tokens
        place = (n * W + w).to(tl.int64)
        mask = in_d[:, None] & here[None, :]
        queries = q_ptr + row * q_row + place[None, :] * q_token + h * q_head + d[:, None]
        each = (row * T + place) * H + h
        query = tl.load(queries, mask=mask, other=0.0)
        s = tl.where(mask, sigma(query, shift_ptr, each[None, :], here[None, :]), 0.0)  # [BD, BW]
        grads = grad_ptr + row * grad_row + place[:, None] * grad_token + h * grad_head + e[None, :]
        grad = tl.load(grads, mask=here[:, None] & in_e[None, :], other=0.0)
        scale = tl.load(scale_ptr + each, mask=here, other=0.0)
        dstate = dot(s * scale[None, :], grad, dstate, PRECISION)
        dz += tl.sum(s * tl.load(dnorm_ptr + each, mask=here, other=0.0)[None, :], axis=1)
    state = segment.to(tl.int64) * D
    tl.store(dstate_ptr + (state + d[:, None]) * DV + e[None, :], dstate, mask=in_d[:, None] & in_e[None, :])
    if v_block == 0:
        tl.store(dz_ptr + state + d, dz, mask=in_d)


@Operator
def read_and_mix_backward(
    grad: Tensor,
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    shift: Tensor | None,
    width: int,
    local_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, A_dot, gate, M and z."""
    (B, N), (_, T, H, D), DV, G = tokens.shape, q.shape, local.shape[-1], M.shape[2]
    (q, q_strides), (local, local_strides), (grad, grad_strides) = (
        by_token(q, width),
        by_token(local, width),
        by_token(grad, width),
    )
    dq, dlocal, dM, dz = _empty(q, local, M, z)
    one_pass = q.dtype == torch.bfloat16 and max(D, DV) <= TILE_OF_ONE_PASS.columns and on_hopper(q)
    BW, BV, warps, stages = TILE_OF_ONE_PASS if one_pass else tile(D, q.dtype, plain=shift is None)
    BW, BV = block(width, BW), block(DV, BV)
    per = blocks_of_a_program(width, BW, B * N * H, warps) if BV >= DV else 1
    programs = cdiv(width, BW * per)
    # In one pass: a gradient of the states for each head and program of a group. In two: two numbers per token and head.
    partials = [x.new_empty(B, N, G, H // G * programs, *x.shape[3:]) for x in (dM, dz)] if one_pass else [None, None]
    scale, dnorm = (None if one_pass else dM.new_empty(B, T, H) for _ in range(2))
    dshare = torch.empty(B, N, H, programs, dtype=torch.float32, device=q.device)
    launch(
        _read_backward_kernel, (B * N * H, programs),
        q, local, gate.contiguous(), M.contiguous(), z.contiguous(), tokens, shift, grad,
        dq, dlocal, dshare, *partials, scale, dnorm,
        *q_strides, *local_strides, *grad_strides, eps, T, N, H, H // G, W=width,
        D=D, DV=DV, BW=BW, BD=block(D), BV=BV, PER=per,
        ONE_PASS=one_pass, LOCAL_ONLY=local_only, PRECISION=dot_precision(q.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    if one_pass:
        for partial, total in zip(partials, (dM, dz), strict=True):
            torch.sum(partial, dim=3, out=total)  # type: ignore[arg-type]
    else:
        _, BD, BV, _ = sum_tile(D, DV, q.dtype)
        BW = 32 if shift is None or q.dtype == torch.float32 else 16
        launch(
            _read_backward_states_kernel, (B * N * G, cdiv(D, BD), cdiv(DV, BV)),
            q, tokens, shift, grad, scale, dnorm, dM, dz, *q_strides, *grad_strides, T, N, H, R=H // G, W=width,
            D=D, DV=DV, BW=block(width, BW), BD=BD, BV=BV, PRECISION=dot_precision(q.dtype), num_warps=8,
        )  # fmt: skip
    return dq, dlocal, dshare.sum(dim=(0, 1, 3)).to(gate.dtype), dM, dz


def _empty(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)


@read_and_mix_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    local: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    tokens: Tensor,
    shift: Tensor | None,
    width: int,
    local_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, local, gate, M, z)  # type: ignore[return-value]
