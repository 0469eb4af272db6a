"""Causal softmax attention inside each segment, without memory.

Shapes: B batch, T tokens, H query heads, G key/value heads, D key width, Dv value width.
"""

from torch import Tensor

from infini_kernels.arguments import Rotary, check_choice, check_heads, check_lengths, check_rotary, check_segment_length
from infini_kernels.backend import BACKENDS, uses_triton
from infini_kernels.segments import SegmentLayout, padding_mask
from infini_kernels.softmax_attention import segment_attention


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_length: int,
    rotary: Rotary | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute segment-local causal softmax attention without memory.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D].
        v: [B, T, G, Dv].
        segment_length: tokens of a segment.
        rotary: as for `infini_attention`.
        lengths: as for `infini_attention`.
        backend: implementation of the rotation of queries and keys; values as for `infini_attention`.

    Returns:
        out [B, T, H, Dv] in v's type, zero at padding.

    Raises:
        ValueError: shapes, types or values do not fit.
    """
    check_choice("backend", backend, BACKENDS)
    check_heads(q, k, v)
    check_segment_length(segment_length)
    check_rotary(rotary, q, segment_length, "segment_length")
    check_lengths(lengths, q.shape[0], q.shape[1], segment_length)

    layout = SegmentLayout.of(q.shape[1], segment_length)
    padding = padding_mask(lengths, q.shape[1], segment_length, q.device)
    if rotary is not None and uses_triton(backend, q, k, v):
        from infini_kernels.triton.operation import local_half, tokens_by_segment

        out = local_half(q, k, v, rotary, tokens_by_segment(lengths, layout, q, segment_length), padding, layout).to(v.dtype)
        return out if padding is None else out.masked_fill(padding, 0)
    if padding is not None:
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    out = layout.unfold(segment_attention(layout.fold(q), layout.fold(k), layout.fold(v), rotary)).to(v.dtype)
    return out if padding is None else out.masked_fill(padding, 0)
