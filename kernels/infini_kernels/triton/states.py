"""σ(K)^T V and Σ σ(K) of every segment, all segments at once.

Shapes: B rows, T tokens, N segments, W tokens of a segment, G key/value heads, D key width, Dv value width. `tokens` [B, N]
int32 is the number of valid (not padding) tokens of each segment. `strength` [B, T, G] float32, if given, replaces the
write strength of 1 for each token. For `shift` see `features`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import (
    block,
    blocks_of_a_program,
    by_token,
    cdiv,
    dot,
    dot_exact,
    dot_precision,
    exact_dot_precision,
    launch,
    load_state,
    sum_tile,
    tile,
)
from infini_kernels.triton.features import sigma, sigma_backward
from infini_kernels.triton.operator import Operator


@triton.jit
def _states_kernel(
    k_ptr, v_ptr, tokens_ptr, shift_ptr, strength_ptr, state_ptr, z_ptr,
    k_row, k_token, k_head, v_row, v_token, v_head,
    T, N, G, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment, d_block, v_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = segment % G
    n = (segment // G) % N
    b = segment // (G * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    d = d_block * BD + tl.arange(0, BD)
    e = v_block * BV + tl.arange(0, BV)
    first = (n * W).to(tl.int64)
    k_ptr += b.to(tl.int64) * k_row + first * k_token + g * k_head
    v_ptr += b.to(tl.int64) * v_row + first * v_token + g * v_head
    place = (b.to(tl.int64) * T + first) * G + g
    state = tl.zeros((BD, BV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        here = w < tokens
        mask_k = here[None, :] & (d < D)[:, None]
        key = tl.load(k_ptr + w[None, :] * k_token + d[:, None], mask=mask_k, other=0.0)
        s = tl.where(mask_k, sigma(key, shift_ptr, place + w[None, :] * G, here[None, :]), 0.0)  # [BD, BW]
        if strength_ptr is not None:
            s *= tl.load(strength_ptr + place + w * G, mask=here, other=0.0)[None, :]
        value = tl.load(v_ptr + w[:, None] * v_token + e[None, :], mask=here[:, None] & (e < DV)[None, :], other=0.0)
        state = dot_exact(s, value, state, PRECISION)
        z += tl.sum(s, axis=1)
    out = segment.to(tl.int64) * D
    tl.store(state_ptr + (out + d[:, None]) * DV + e[None, :], state, mask=(d < D)[:, None] & (e < DV)[None, :])
    if v_block == 0:
        tl.store(z_ptr + out + d, z, mask=d < D)


@triton.jit
def _states_backward_kernel(
    k_ptr, v_ptr, tokens_ptr, shift_ptr, strength_ptr, dstate_ptr, dz_ptr, dk_ptr, dv_ptr, dstrength_ptr,
    k_row, k_token, k_head, v_row, v_token, v_head,
    T, N, G, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    g = segment % G
    n = (segment // G) % N
    b = segment // (G * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    d = tl.arange(0, BD)
    row, in_d = b.to(tl.int64), d < D
    state = segment.to(tl.int64) * D
    by_z = tl.load(dz_ptr + state + d, mask=in_d, other=0.0)
    if BV >= DV:  # load the whole gradient once, for all tokens of the program
        dstate = load_state(dstate_ptr, state, d, tl.arange(0, BV), D, DV)
    for piece in range(0, PER):
        w = (tl.program_id(1) * PER + piece) * BW + tl.arange(0, BW)
        t = n * W + w
        here, inside, place = w < tokens, (w < W) & (t < T), t.to(tl.int64)
        mask = here[:, None] & in_d[None, :]
        key = tl.load(k_ptr + row * k_row + place[:, None] * k_token + g * k_head + d[None, :], mask=mask, other=0.0)
        out = (row * T + place) * G + g
        s = tl.where(mask, sigma(key, shift_ptr, out[:, None], here[:, None]), 0.0)  # [BW, BD]
        if strength_ptr is not None:
            strength = tl.load(strength_ptr + out, mask=here, other=0.0)
        ds = tl.zeros((BW, BD), tl.float32)
        for start in range(0, DV, BV):
            e = start + tl.arange(0, BV)
            in_e = e < DV
            if BV < DV:
                dstate = load_state(dstate_ptr, state, d, e, D, DV)
            values = v_ptr + row * v_row + place[:, None] * v_token + g * v_head + e[None, :]
            value = tl.load(values, mask=here[:, None] & in_e[None, :], other=0.0)
            ds = dot(value, tl.trans(dstate), ds, PRECISION)
            dvalue = dot(s, dstate, None, PRECISION)
            if strength_ptr is not None:
                dvalue *= strength[:, None]
            mask_v = inside[:, None] & in_e[None, :]
            tl.store(dv_ptr + out[:, None] * DV + e[None, :], dvalue.to(dv_ptr.dtype.element_ty), mask=mask_v)
        ds += by_z[None, :]
        if strength_ptr is not None:
            tl.store(dstrength_ptr + out, tl.sum(ds * s, axis=1), mask=inside)
            ds *= strength[:, None]
        dkey = tl.where(mask, sigma_backward(ds, s, shift_ptr), 0.0).to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + out[:, None] * D + d[None, :], dkey, mask=inside[:, None] & in_d[None, :])


@Operator
def segment_states(
    k: Tensor, v: Tensor, tokens: Tensor, width: int, shift: Tensor | None = None, strength: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute σ(K)^T V [B, N, G, D, Dv] and Σ σ(K) [B, N, G, D], float32.

    Args:
        k: [B, T, G, D].
        v: [B, T, G, Dv].
        tokens: [B, N] int32.
        width: W.
        shift: [B, T, G]; None for ELU + 1.
        strength: [B, T, G]; None for 1.
    """
    (B, N), (_, T, G, D), DV = tokens.shape, k.shape, v.shape[-1]
    (k, k_strides), (v, v_strides) = by_token(k, width), by_token(v, width)
    state = k.new_empty(B, N, G, D, DV, dtype=torch.float32)
    z = k.new_empty(B, N, G, D, dtype=torch.float32)
    BW, BD, BV, warps = sum_tile(D, DV, k.dtype)
    grid = (B * N * G, cdiv(D, BD), cdiv(DV, BV))
    launch(
        _states_kernel, grid,
        k, v, tokens, shift, strength, state, z, *k_strides, *v_strides, T, N, G, W=width,
        D=D, DV=DV, BW=block(width, BW), BD=BD, BV=BV, PRECISION=exact_dot_precision(v.dtype), num_warps=warps,
        num_stages=2 if k.dtype == torch.float16 else 3,
    )  # fmt: skip
    return state, z


@segment_states.register_fake
def _(
    k: Tensor, v: Tensor, tokens: Tensor, width: int, shift: Tensor | None = None, strength: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = *tokens.shape, k.shape[2], k.shape[3]
    return k.new_empty(*shape, v.shape[-1], dtype=torch.float32), k.new_empty(shape, dtype=torch.float32)


@Operator
def segment_states_backward(
    dstate: Tensor, dz: Tensor, k: Tensor, v: Tensor, tokens: Tensor, shift: Tensor | None, strength: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of k, v and strength, zero at padding. The last is empty if there is no strength."""
    (B, N), (_, T, G, D), DV = tokens.shape, k.shape, v.shape[-1]
    (k, k_strides), (v, v_strides) = by_token(k, width), by_token(v, width)
    dk, dv, dstrength = _backward_outputs(k, v, strength)
    BW, BV, warps, stages = tile(D, k.dtype, plain=shift is None and strength is None)
    if shift is not None or strength is not None:
        BW, stages = 16, 2
    BW, BV = block(width, BW), block(DV, BV)
    per = blocks_of_a_program(width, BW, B * N * G, warps) if BV >= DV else 1
    launch(
        _states_backward_kernel, (B * N * G, cdiv(width, BW * per)),
        k, v, tokens, shift, strength, dstate.contiguous(), dz.contiguous(), dk, dv, dstrength,
        *k_strides, *v_strides, T, N, G, W=width,
        D=D, DV=DV, BW=BW, BD=block(D), BV=BV, PER=per, PRECISION=dot_precision(k.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dk, dv, dstrength


def _backward_outputs(k: Tensor, v: Tensor, strength: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return dk, dv, k.new_empty((0,) if strength is None else k.shape[:3], dtype=torch.float32)


@segment_states_backward.register_fake
def _(
    dstate: Tensor, dz: Tensor, k: Tensor, v: Tensor, tokens: Tensor, shift: Tensor | None, strength: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(k, v, strength)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    k, v, tokens, ctx.width, shift, strength = inputs
    ctx.save_for_backward(k, v, tokens, shift, strength)


def _backward(ctx: Any, dstate: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under checkpointing a second access fails
    dk, dv, dstrength = segment_states_backward(dstate, dz, *saved, ctx.width)
    return dk, dv, None, None, None, None if saved[-1] is None else dstrength


segment_states.register_autograd(_backward, setup_context=_save)
