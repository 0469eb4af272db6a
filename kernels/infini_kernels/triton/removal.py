"""Removal of the delta rule: σ(K)^T diag(1 / (σ(K) z + ε)) σ(K) of every segment.

Shapes: X segments of any rows, W tokens of a segment, G key/value heads, D key width. `rows` [X] int32 lists the segments
as b N + n; `tokens` [X] int32 is the number of valid (not padding) tokens of each. If `strength` [B, T, G] float32 is
given, the removal is σ(K)^T diag(strength / (σ(K) z + ε)) σ(K). For `shift` see `features`.
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
    dot_exact_both,
    dot_precision,
    exact_dot_precision,
    launch,
    load_state,
    tile,
)
from infini_kernels.triton.features import sigma, sigma_backward
from infini_kernels.triton.operator import Operator


@triton.jit
def _scale_kernel(
    k_ptr, z_ptr, rows_ptr, tokens_ptr, shift_ptr, scale_ptr, k_row, k_token, k_head, eps, T, N, G, W: tl.constexpr,
    D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute 1 / (σ(K) z + ε) of each token, 0 at padding: [X, G, W]."""
    program = tl.program_id(0)
    g, x = program % G, program // G
    segment = tl.load(rows_ptr + x)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    d = tl.arange(0, BD)
    here, in_d = w < tl.load(tokens_ptr + x), d < D
    place = ((segment % N) * W + w).to(tl.int64)
    row = (segment // N).to(tl.int64)
    keys = k_ptr + row * k_row + place[:, None] * k_token + g * k_head + d[None, :]
    mask = here[:, None] & in_d[None, :]
    places = ((row * T + place) * G + g)[:, None]
    s = tl.where(mask, sigma(tl.load(keys, mask=mask, other=0.0), shift_ptr, places, here[:, None]), 0.0)
    z = tl.load(z_ptr + program.to(tl.int64) * D + d, mask=in_d, other=0.0)
    scale = tl.where(here, 1 / (tl.sum(s * z[None, :], axis=1) + eps), 0.0)
    tl.store(scale_ptr + program.to(tl.int64) * W + w, scale, mask=w < W)


@triton.jit
def _removal_kernel(
    k_ptr, scale_ptr, rows_ptr, tokens_ptr, shift_ptr, strength_ptr, removed_ptr,
    k_row, k_token, k_head, T, N, G, W: tl.constexpr,
    D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    g, x = program % G, program // G
    segment = tl.load(rows_ptr + x)
    tokens = tl.load(tokens_ptr + x)
    i = tl.program_id(1) * BD + tl.arange(0, BD)
    j = tl.program_id(2) * BD + tl.arange(0, BD)
    row, first = (segment // N).to(tl.int64), ((segment % N) * W).to(tl.int64)
    keys = k_ptr + row * k_row + first * k_token + g * k_head
    removed = tl.zeros((BD, BD), tl.float32)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        here = w < tokens
        left_mask, right_mask = (i < D)[:, None] & here[None, :], here[:, None] & (j < D)[None, :]
        left = tl.load(keys + w[None, :].to(tl.int64) * k_token + i[:, None], mask=left_mask, other=0.0)
        right = tl.load(keys + w[:, None].to(tl.int64) * k_token + j[None, :], mask=right_mask, other=0.0)
        places = (row * T + first + w) * G + g
        scale = tl.load(scale_ptr + program.to(tl.int64) * W + w, mask=here, other=0.0)
        if strength_ptr is not None:
            scale *= tl.load(strength_ptr + places, mask=here, other=0.0)
        left = tl.where(left_mask, sigma(left, shift_ptr, places[None, :], here[None, :]), 0.0) * scale[None, :]
        right = tl.where(right_mask, sigma(right, shift_ptr, places[:, None], here[:, None]), 0.0)
        removed = dot_exact_both(left, right, removed, PRECISION)
    out = removed_ptr + program.to(tl.int64) * D * D + i[:, None] * D + j[None, :]
    tl.store(out, removed, mask=(i < D)[:, None] & (j < D)[None, :])


@triton.jit
def _removal_backward_kernel(
    k_ptr, z_ptr, scale_ptr, symmetric_ptr, rows_ptr, tokens_ptr, shift_ptr, strength_ptr, dk_ptr, dz_ptr, dstrength_ptr,
    k_row, k_token, k_head, T, N, G, W: tl.constexpr,
    D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, PER: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys, of strength, and of z for each program [X, G, programs, D].

    The input is the gradient of the removal plus its transpose. With WHOLE, all segments are present in order and tensors
    with tokens are [B, T, G, ...]; otherwise they are [X, W, G, ...].
    """
    program = tl.program_id(0)
    g, x = program % G, program // G
    segment = tl.load(rows_ptr + x)
    tokens = tl.load(tokens_ptr + x)
    d = tl.arange(0, BD)
    in_d = d < D
    row = (segment // N).to(tl.int64)
    keys = k_ptr + row * k_row + g * k_head
    matrix = program.to(tl.int64) * D
    z = tl.load(z_ptr + program.to(tl.int64) * D + d, mask=in_d, other=0.0)
    dz = tl.zeros((BD,), tl.float32)
    if BJ >= D:  # load the whole gradient once, for all tokens of the program
        symmetric = load_state(symmetric_ptr, matrix, d, d, D, D)
    for step in range(0, PER):
        w = (tl.program_id(1) * PER + step) * BW + tl.arange(0, BW)
        here = w < tokens
        place = ((segment % N) * W + w).to(tl.int64)
        mask = here[:, None] & in_d[None, :]
        places = (row * T + place) * G + g
        key = tl.load(keys + place[:, None] * k_token + d[None, :], mask=mask, other=0.0)
        s = tl.where(mask, sigma(key, shift_ptr, places[:, None], here[:, None]), 0.0)
        if BJ >= D:
            product = dot(s, symmetric, None, PRECISION)
        else:
            product = tl.zeros((BW, BD), tl.float32)
            for first in range(0, D, BJ):
                j = first + tl.arange(0, BJ)
                piece_mask = here[:, None] & (j < D)[None, :]
                piece = tl.load(keys + place[:, None] * k_token + j[None, :], mask=piece_mask, other=0.0)
                piece = tl.where(piece_mask, sigma(piece, shift_ptr, places[:, None], here[:, None]), 0.0)
                product = dot(piece, load_state(symmetric_ptr, matrix, j, d, D, D), product, PRECISION)
        scale = tl.load(scale_ptr + program.to(tl.int64) * W + w, mask=here, other=0.0)
        by_scale = scale * tl.sum(product * s, axis=1) / 2
        if WHOLE:
            out, inside = places, (w < W) & (place < T)
        else:
            out, inside = (x.to(tl.int64) * W + w) * G + g, w < W
        dnorm = -by_scale * scale
        if strength_ptr is not None:
            tl.store(dstrength_ptr + out, by_scale, mask=inside)
            strength = tl.load(strength_ptr + places, mask=here, other=0.0)
            dnorm *= strength
            scale *= strength
        dkey = sigma_backward(product * scale[:, None] + dnorm[:, None] * z[None, :], s, shift_ptr)
        dkey = tl.where(mask, dkey, 0.0).to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + out[:, None] * D + d[None, :], dkey, mask=inside[:, None] & in_d[None, :])
        dz += tl.sum(s * dnorm[:, None], axis=0)
    slot = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(dz_ptr + slot * D + d, dz, mask=in_d)


@Operator
def segment_removals(
    k: Tensor,
    z: Tensor,
    rows: Tensor,
    tokens: Tensor,
    width: int,
    eps: float,
    shift: Tensor | None = None,
    strength: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the removals of the delta rule.

    Args:
        k: [B, T, G, D].
        z: z that enters each segment, [X, G, D].
        rows: [X] int32.
        tokens: [X] int32.
        width: W.
        eps: ε.
        shift: [B, T, G]; None for ELU + 1.
        strength: [B, T, G]; None for 1.
        whole: rows are all segments in order.

    Returns:
        removed [X, G, D, D], and 1 / (σ(K) z + ε) [X, G, W] for the backward; float32.
    """
    (X, G, D), T, N = z.shape, k.shape[1], -(-k.shape[1] // width)
    k, strides = by_token(k)
    scale = torch.empty(X, G, width, dtype=torch.float32, device=k.device)
    removed = torch.empty(X, G, D, D, dtype=torch.float32, device=k.device)
    BW = block(width, 64)
    launch(
        _scale_kernel, (X * G, cdiv(width, BW)),
        k, z.contiguous(), rows, tokens, shift, scale, *strides, eps, T, N, G, W=width, D=D, BW=BW, BD=block(D),
    )  # fmt: skip
    BW, BD, warps, stages = {torch.float32: (32, 32, 4, 2), torch.float16: (32, 64, 4, 2)}.get(k.dtype, (64, 128, 8, 3))
    BD = block(D, BD)
    launch(
        _removal_kernel, (X * G, cdiv(D, BD), cdiv(D, BD)),
        k, scale, rows, tokens, shift, strength, removed, *strides, T, N, G, W=width,
        D=D, BW=block(width, BW), BD=BD, PRECISION=exact_dot_precision(k.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return removed, scale


@segment_removals.register_fake
def _(
    k: Tensor,
    z: Tensor,
    rows: Tensor,
    tokens: Tensor,
    width: int,
    eps: float,
    shift: Tensor | None = None,
    strength: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    (X, G, D) = z.shape
    return z.new_empty(X, G, D, D, dtype=torch.float32), z.new_empty(X, G, width, dtype=torch.float32)


@Operator
def segment_removals_backward(
    gradient: Tensor,
    k: Tensor,
    z: Tensor,
    scale: Tensor,
    rows: Tensor,
    tokens: Tensor,
    shift: Tensor | None,
    strength: Tensor | None,
    width: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the keys of these segments, of z [X, G, D], and of strength.

    With whole, the gradients of keys and strength are [B, T, G, ...] in their types; otherwise they are [X, W, G, ...] in
    float32. The gradient of strength is empty if there is no strength.
    """
    (X, G, D), T, N = z.shape, k.shape[1], -(-k.shape[1] // width)
    k, strides = by_token(k)
    symmetric = gradient + gradient.transpose(-1, -2)
    dk, dz, dstrength = _backward_outputs(k, z, strength, width, whole)
    BW, BJ, warps, stages = tile(D, k.dtype, plain=shift is None and strength is None)
    BW, BJ = block(width, min(BW, 32)), block(D, BJ)
    per = blocks_of_a_program(width, BW, X * G, warps) if BJ >= D else 1
    programs = cdiv(width, BW * per)
    partials = dz.new_empty(X, G, programs, D)
    launch(
        _removal_backward_kernel, (X * G, programs),
        k, z.contiguous(), scale, symmetric, rows, tokens, shift, strength, dk, partials, dstrength, *strides, T, N, G, W=width,
        D=D, BW=BW, BD=block(D), BJ=BJ, PER=per, WHOLE=whole, PRECISION=dot_precision(k.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return dk, torch.sum(partials, dim=2, out=dz), dstrength


def _backward_outputs(k: Tensor, z: Tensor, strength: Tensor | None, width: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    X, G, D = z.shape
    dz, no_strength = z.new_empty(X, G, D, dtype=torch.float32), z.new_empty((0,), dtype=torch.float32)
    if whole:
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        return dk, dz, no_strength if strength is None else z.new_empty(k.shape[:3], dtype=torch.float32)
    dk = z.new_empty(X, width, G, D, dtype=torch.float32)
    return dk, dz, no_strength if strength is None else z.new_empty(X, width, G, dtype=torch.float32)


@segment_removals_backward.register_fake
def _(
    gradient: Tensor,
    k: Tensor,
    z: Tensor,
    scale: Tensor,
    rows: Tensor,
    tokens: Tensor,
    shift: Tensor | None,
    strength: Tensor | None,
    width: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(k, z, strength, width, whole)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, z, rows, tokens, ctx.width, _, shift, strength, ctx.whole = inputs
    ctx.save_for_backward(k, z, output[1], rows, tokens, shift, strength)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under checkpointing a second access fails
    k, _, _, rows, _, _, strength = saved
    dk, dz, dstrength = segment_removals_backward(gradient, *saved, ctx.width, ctx.whole)

    def at_their_places(x: Tensor) -> Tensor:
        """Scatter x [X, W, ...] to all tokens, [B, T, ...], with zeros in the other segments."""
        B, T = k.shape[:2]
        num_segments = -(-T // ctx.width)
        everywhere = torch.zeros(B * num_segments, *x.shape[1:], dtype=torch.float32, device=k.device)
        everywhere.index_copy_(0, rows.long(), x)
        return everywhere.view(B, num_segments * ctx.width, *x.shape[2:])[:, :T]

    if not ctx.whole:
        dk = at_their_places(dk).to(k.dtype)
        dstrength = dstrength if strength is None else at_their_places(dstrength)
    return dk, dz, None, None, None, None, None, None if strength is None else dstrength, None


segment_removals.register_autograd(_backward, setup_context=_save)
