"""Causal softmax attention over whole documents without a T x T mask: the full-attention baseline.

Shapes: B batch, T tokens, N segments, P valid tokens of all rows, H query heads, G key/value heads, D key width, Dv value
width.
"""

import torch
from torch import Tensor

from infini_kernels.arguments import Rotary, check_heads, check_lengths, check_reset, check_rotary, check_segment_length
from infini_kernels.local import local_attention
from infini_kernels.rotary import apply_rotary
from infini_kernels.segments import lengths_by_segment, padding_mask
from infini_kernels.softmax_attention import causal_attention, deterministic, equal_widths, flash_attention_for
from infini_kernels.timing import timed_as


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_length: int,
    reset: Tensor | None,
    lengths: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Compute causal attention over the whole call, but never across documents.

    A document begins at the start of each row and at each segment that has reset. Padding is not attended to. The host
    needs to know where documents end: keep `reset` and `lengths` on the CPU, otherwise the host waits for the accelerator.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D].
        v: [B, T, G, Dv].
        segment_length: tokens of a segment.
        reset: [B, N] bool, a document begins at that segment; None for none.
        lengths: valid tokens, as for `infini_attention`.
        rotary: (cos, sin), each [T, D/2], by position in the call.

    Returns:
        out [B, T, H, Dv] in v's type, zero at padding.

    Raises:
        ValueError: shapes, types or values do not fit.
    """
    check_heads(q, k, v)
    batch_size, num_tokens = q.shape[:2]
    check_segment_length(segment_length)
    check_rotary(rotary, q, num_tokens, "tokens")
    check_reset(reset, batch_size, -(-num_tokens // segment_length))
    lengths = None if lengths is None else lengths.cpu()
    check_lengths(lengths, batch_size, num_tokens, segment_length)

    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    spans = _document_lengths(reset, lengths, batch_size, num_tokens, segment_length)
    if not spans:  # only padding: return zeros that stay in the graph
        return local_attention(q, k, v, segment_length=segment_length, lengths=lengths)
    padding = padding_mask(lengths, num_tokens, segment_length, torch.device("cpu"))  # [B, T, 1, 1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B*T, heads, width]
    if padding is None:
        return _packed_attention(q, k, v, spans).to(v.dtype).unflatten(0, (batch_size, num_tokens))

    kept = padding.logical_not().flatten().nonzero().squeeze(1).to(q.device)  # [P]
    out = v.new_zeros(batch_size * num_tokens, q.shape[1], v.shape[2])  # [B*T, H, Dv]
    q, k, v = (x.index_select(0, kept) for x in (q, k, v))  # [P, heads, width]
    out = out.index_copy(0, kept, _packed_attention(q, k, v, spans).to(v.dtype))
    return out.unflatten(0, (batch_size, num_tokens))


def _document_lengths(
    reset: Tensor | None, lengths: Tensor | None, batch_size: int, num_tokens: int, segment_length: int
) -> list[int]:
    """Return the number of valid tokens of every document, row after row, without empty documents."""
    if lengths is None:
        lengths = torch.full((batch_size,), num_tokens)
    segment_tokens = lengths_by_segment(lengths, num_tokens, segment_length).tolist()
    begins = [[False] * len(row) for row in segment_tokens] if reset is None else reset.tolist()
    documents: list[int] = []
    for row_tokens, row_begins in zip(segment_tokens, begins, strict=True):
        documents.append(0)
        for tokens, begin in zip(row_tokens, row_begins, strict=True):
            if begin:
                documents.append(0)
            documents[-1] += tokens
    return [tokens for tokens in documents if tokens]


@timed_as("local attention")
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, spans: list[int]) -> Tensor:
    """Compute causal attention inside each of the spans that make up P tokens.

    q [P, H, D], k [P, G, D], v [P, G, Dv] -> [P, H, Dv]
    """
    if len(set(spans)) == 1:  # for example no document ends inside a row: one call for all
        rows = (len(spans), spans[0])
        return causal_attention(q.unflatten(0, rows), k.unflatten(0, rows), v.unflatten(0, rows)).flatten(0, 1)
    flash_attn = flash_attention_for(q, v)
    if flash_attn is None:
        pieces = zip(*(x.split(spans) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*(x.unsqueeze(0) for x in piece)).squeeze(0) for piece in pieces])
    scale, value_width = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = equal_widths(q, k, v)
    ends = torch.tensor([0, *spans]).cumsum(0).to(q.device, torch.int32)
    options = {"softmax_scale": scale, "causal": True, "deterministic": deterministic()}
    out = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, max(spans), max(spans), **options)
    return (out[0] if isinstance(out, tuple) else out)[..., :value_width]
