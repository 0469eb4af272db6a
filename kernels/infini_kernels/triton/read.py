"""Reading the memory, normalising and mixing with local attention in one pass over the tokens (arXiv 2404.07143, Eq. 3 and 10).

Shapes: B rows, T tokens, N segments, W tokens of a segment, H query heads, G key/value heads, R = H / G, D key width, Dv value
width. `tokens` [B, N] int32 says how many of a segment's tokens are no padding; for `shift` see `features`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_kernels.triton.blocks import block, by_token, launch, product_precision, sum_tile, tile
from infini_kernels.triton.features import sigma, sigma_backward


@triton.jit
def _share(gate_ptr, z, h, LOCAL_ONLY: tl.constexpr):
    """Share of the memory in head h: sigmoid(β), and 0 where LOCAL_ONLY finds the memory empty."""
    share = tl.sigmoid(tl.load(gate_ptr + h).to(tl.float32))
    if LOCAL_ONLY:
        share = tl.where(tl.max(tl.abs(z), axis=0) > 0, share, 0.0)
    return share


@triton.jit
def _read_kernel(
    q_ptr, local_ptr, gate_ptr, state_ptr, z_ptr, tokens_ptr, shift_ptr, out_ptr,
    q_row, q_token, q_head, local_row, local_token, local_head,
    eps, T, N, H, R, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    LOCAL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    h = program % H
    n = (program // H) % N
    b = program // (H * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    t = n * W + w
    d = tl.arange(0, BD)
    here, inside, in_d = w < tokens, (w < W) & (t < T), d < D
    row, place = b.to(tl.int64), t.to(tl.int64)
    mask = here[:, None] & in_d[None, :]
    query = tl.load(q_ptr + row * q_row + place[:, None] * q_token + h * q_head + d[None, :], mask=mask, other=0.0)
    places = (row * T + place) * H + h
    s = tl.where(mask, sigma(query, shift_ptr, places[:, None], here[:, None]), 0.0)  # [BW, BD]
    state = ((row * N + n) * (H // R) + h // R) * D
    z = tl.load(z_ptr + state + d, mask=in_d, other=0.0)
    share = _share(gate_ptr, z, h, LOCAL_ONLY)
    scale = share / (tl.sum(s * z[None, :], axis=1) + eps)  # [BW]
    out = places * DV
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        in_e = e < DV
        states = state_ptr + (state + d[:, None]) * DV + e[None, :]
        memory = tl.load(states, mask=in_d[:, None] & in_e[None, :], other=0.0)
        read = tl.dot(s, memory, input_precision=PRECISION) * scale[:, None]
        locals_ = local_ptr + row * local_row + place[:, None] * local_token + h * local_head + e[None, :]
        local = tl.load(locals_, mask=here[:, None] & in_e[None, :], other=0.0).to(tl.float32)
        mixed = tl.where(here[:, None], read + (1 - share) * local, 0.0)
        tl.store(out_ptr + out[:, None] + e[None, :], mixed.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_e[None, :])


@triton.jit
def _read_backward_tokens_kernel(
    q_ptr, local_ptr, gate_ptr, state_ptr, z_ptr, tokens_ptr, shift_ptr, grad_ptr,
    dq_ptr, dlocal_ptr, scale_ptr, dnorm_ptr, dshare_ptr,
    q_row, q_token, q_head, local_row, local_token, local_head, grad_row, grad_token, grad_head,
    eps, T, N, H, R, W: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    LOCAL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    h = program % H
    n = (program // H) % N
    b = program // (H * N)
    tokens = tl.load(tokens_ptr + b * N + n)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    t = n * W + w
    d = tl.arange(0, BD)
    here, inside, in_d = w < tokens, (w < W) & (t < T), d < D
    row, place = b.to(tl.int64), t.to(tl.int64)
    mask = here[:, None] & in_d[None, :]
    query = tl.load(q_ptr + row * q_row + place[:, None] * q_token + h * q_head + d[None, :], mask=mask, other=0.0)
    places = (row * T + place) * H + h
    s = tl.where(mask, sigma(query, shift_ptr, places[:, None], here[:, None]), 0.0)  # [BW, BD]
    state = ((row * N + n) * (H // R) + h // R) * D
    z = tl.load(z_ptr + state + d, mask=in_d, other=0.0)
    share = _share(gate_ptr, z, h, LOCAL_ONLY)
    norm = tl.sum(s * z[None, :], axis=1) + eps  # [BW]
    by_read = tl.zeros((BW, BD), tl.float32)  # Σ_e g M
    read_grad = tl.zeros((BW,), tl.float32)  # Σ_e g σ(q) M
    local_grad = tl.zeros((BW,), tl.float32)  # Σ_e g A_dot
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        in_e = e < DV
        wide = here[:, None] & in_e[None, :]
        states = state_ptr + (state + d[:, None]) * DV + e[None, :]
        memory = tl.load(states, mask=in_d[:, None] & in_e[None, :], other=0.0)
        grads = grad_ptr + row * grad_row + place[:, None] * grad_token + h * grad_head + e[None, :]
        grad = tl.load(grads, mask=wide, other=0.0).to(tl.float32)
        locals_ = local_ptr + row * local_row + place[:, None] * local_token + h * local_head + e[None, :]
        local = tl.load(locals_, mask=wide, other=0.0).to(tl.float32)
        read_grad += tl.sum(tl.dot(s, memory, input_precision=PRECISION) * grad, axis=1)
        local_grad += tl.sum(local * grad, axis=1)
        by_read = tl.dot(grad, tl.trans(memory), by_read, input_precision=PRECISION)
        dlocal = (1 - share) * grad
        tl.store(
            dlocal_ptr + places[:, None] * DV + e[None, :],
            dlocal.to(dlocal_ptr.dtype.element_ty),
            mask=inside[:, None] & in_e[None, :],
        )
    scale = tl.where(here, share / norm, 0.0)
    dnorm = -scale * read_grad / norm
    dquery = tl.where(mask, sigma_backward(by_read * scale[:, None] + dnorm[:, None] * z[None, :], s, shift_ptr), 0.0)
    tl.store(
        dq_ptr + places[:, None] * D + d[None, :], dquery.to(dq_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :]
    )
    tl.store(scale_ptr + places, scale, mask=inside)
    tl.store(dnorm_ptr + places, dnorm, mask=inside)
    dshare = tl.sum(tl.where(here, read_grad / norm - local_grad, 0.0), axis=0)
    if LOCAL_ONLY:
        dshare = tl.where(tl.max(tl.abs(z), axis=0) > 0, dshare, 0.0)
    tl.store(dshare_ptr + program * tl.num_programs(1) + tl.program_id(1), dshare)


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
    for h in range(g * R, g * R + R):
        for start in range(0, W, BW):
            w = start + tl.arange(0, BW)
            here = w < tokens
            place = (n * W + w).to(tl.int64)
            mask = in_d[:, None] & here[None, :]
            queries = q_ptr + row * q_row + place[None, :] * q_token + h * q_head + d[:, None]
            each = (row * T + place) * H + h
            query = tl.load(queries, mask=mask, other=0.0)
            s = tl.where(mask, sigma(query, shift_ptr, each[None, :], here[None, :]), 0.0)  # [BD, BW]
            grads = grad_ptr + row * grad_row + place[:, None] * grad_token + h * grad_head + e[None, :]
            grad = tl.load(grads, mask=here[:, None] & in_e[None, :], other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + each, mask=here, other=0.0)
            dstate = tl.dot(s, grad * scale[:, None], dstate, input_precision=PRECISION)
            dz += tl.sum(s * tl.load(dnorm_ptr + each, mask=here, other=0.0)[None, :], axis=1)
    state = segment.to(tl.int64) * D
    tl.store(dstate_ptr + (state + d[:, None]) * DV + e[None, :], dstate, mask=in_d[:, None] & in_e[None, :])
    if v_block == 0:
        tl.store(dz_ptr + state + d, dz, mask=in_d)


@torch.library.custom_op("infini_kernels::read_and_mix", mutates_args=())
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
    """q [B, T, H, D], A_dot [B, T, H, Dv], gate [H], M [B, N, G, D, Dv] and z [B, N, G, D] that enter each segment,
    tokens [B, N], W -> [B, T, H, Dv] in A_dot's type, zero at padding."""
    out = torch.empty(local.shape, dtype=local.dtype, device=local.device)
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
    """`read_and_mix` into A_dot, which must be contiguous; it has no gradient, which would need A_dot as it was."""
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
    (q, q_strides), (local, local_strides) = by_token(q), by_token(local)
    BW, BV, warps = tile(D, q.dtype, plain=shift is None)
    BW = block(width, BW)
    launch(
        _read_kernel, (B * N * H, triton.cdiv(width, BW)),
        q, local, gate, M.contiguous(), z.contiguous(), tokens, shift, out, *q_strides, *local_strides,
        eps, T, N, H, H // M.shape[2], W=width, D=D, DV=DV, BW=BW, BD=block(D), BV=block(DV, BV),
        LOCAL_ONLY=local_only, PRECISION=product_precision(q.dtype), num_warps=warps,
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
    return torch.empty(local.shape, dtype=local.dtype, device=local.device)


@torch.library.custom_op("infini_kernels::read_and_mix_backward", mutates_args=())
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
    """Gradients of q, A_dot, gate, M and z."""
    (B, N), (_, T, H, D), DV, G = tokens.shape, q.shape, local.shape[-1], M.shape[2]
    (q, q_strides), (local, local_strides), (grad, grad_strides) = by_token(q), by_token(local), by_token(grad)
    dq, dlocal, dgate, dM, dz = _backward_outputs(q, local, gate, M, z)
    scale, dnorm = (torch.empty(B, T, H, dtype=torch.float32, device=q.device) for _ in range(2))
    precision = product_precision(q.dtype)
    BW, BV, warps = tile(D, q.dtype, plain=shift is None)
    BW = block(width, BW)
    blocks = triton.cdiv(width, BW)
    dshare = torch.empty(B, N, H, blocks, dtype=torch.float32, device=q.device)
    launch(
        _read_backward_tokens_kernel, (B * N * H, blocks),
        q, local, gate, M.contiguous(), z.contiguous(), tokens, shift, grad, dq, dlocal, scale, dnorm, dshare,
        *q_strides, *local_strides, *grad_strides, eps, T, N, H, H // G, W=width,
        D=D, DV=DV, BW=BW, BD=block(D), BV=block(DV, BV), LOCAL_ONLY=local_only, PRECISION=precision,
        num_warps=warps,
    )  # fmt: skip
    _, BD, BV, _ = sum_tile(D, DV, q.dtype)
    BW = 32 if shift is None or q.dtype == torch.float32 else 16
    launch(
        _read_backward_states_kernel, (B * N * G, triton.cdiv(D, BD), triton.cdiv(DV, BV)),
        q, tokens, shift, grad, scale, dnorm, dM, dz, *q_strides, *grad_strides, T, N, H, R=H // G, W=width,
        D=D, DV=DV, BW=block(width, BW), BD=BD, BV=BV, PRECISION=precision, num_warps=8,
    )  # fmt: skip
    share = gate.float().sigmoid()
    dgate.copy_(dshare.sum(dim=(0, 1, 3)) * share * (1 - share))
    return dq, dlocal, dgate, dM, dz


def _backward_outputs(q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, local, gate, M, z))


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
    return _backward_outputs(q, local, gate, M, z)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.width, ctx.local_only, ctx.eps, shift = inputs
    ctx.save_for_backward(*tensors, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = read_and_mix_backward(grad, *ctx.saved_tensors, ctx.width, ctx.local_only, ctx.eps)
    return *gradients, None, None, None, None, None


read_and_mix.register_autograd(_backward, setup_context=_save)
