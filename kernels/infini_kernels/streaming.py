"""Inference over a stream that arrives in chunks, with constant GPU memory for any length of the stream.

Shapes: B batch, S segment length, t tokens of a chunk, n tokens of the current segment already in the cache, H query heads,
G key/value heads, D key width, Dv value width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_kernels.arguments import (
    FIRST_SEGMENT_MIXES,
    UPDATE_RULES,
    Rotary,
    check_choice,
    check_eps,
    check_gate,
    check_heads,
    check_memory,
    check_normaliser,
    check_rotary,
    check_segment_length,
    check_write_gate,
)
from infini_kernels.compressive import PlainUpdates, SegmentMemory, full_precision, read_and_mix, sigma
from infini_kernels.memory import MemoryState, memory_dtype
from infini_kernels.rotary import apply_rotary
from infini_kernels.variants import FEATURE_MAPS, read_state, remembered_values, write_strength


@dataclass(frozen=True)
class SegmentCache:
    """State of one layer for its stream: the memory of finished segments, and the unfinished segment.

    A step writes into `keys` and `values` and returns a cache that shares them, so the old cache must not be used again. To
    continue one stream in several ways, `clone` the cache first.
    """

    memory: MemoryState | None  # None if the layer has no memory
    keys: Tensor  # [B, S, G, D], before rotary embedding; the first `length` tokens are valid
    values: Tensor  # [B, S, G, Dv]
    length: int = 0

    @classmethod
    def empty(
        cls,
        batch_size: int,
        segment_length: int,
        num_query_groups: int,
        key_width: int,
        value_width: int,
        *,
        with_memory: bool = True,
        normaliser: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "SegmentCache":
        """Return the cache at the start of a stream. `dtype` is the type of keys and values."""
        check_segment_length(segment_length)
        memory = None
        if with_memory:
            width = value_width + (normaliser == "corrected")
            memory = MemoryState.zeros(batch_size, num_query_groups, key_width, width, device=device, dtype=memory_dtype(dtype))
        return cls(
            memory,
            torch.zeros(batch_size, segment_length, num_query_groups, key_width, device=device, dtype=dtype),
            torch.zeros(batch_size, segment_length, num_query_groups, value_width, device=device, dtype=dtype),
        )

    @property
    def remaining(self) -> int:
        """Number of tokens until the current segment ends: the longest chunk that the next step accepts."""
        return self.keys.shape[1] - self.length

    def clone(self) -> "SegmentCache":
        """Return a copy with its own storage."""
        memory = None if self.memory is None else MemoryState(self.memory.M.clone(), self.memory.z.clone())
        return SegmentCache(memory, self.keys.clone(), self.values.clone(), self.length)


@torch.no_grad()
def infini_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cache: SegmentCache,
    *,
    segment_length: int,
    update_rule: str = "linear",
    rotary: Rotary | None = None,
    first_segment: str = "paper",
    eps: float = 1e-6,
    write_gate: Tensor | None = None,
    normaliser: str = "paper",
    feature_map: str = "elu",
) -> tuple[Tensor, SegmentCache]:
    """Compute the next t tokens of a stream, equal to `infini_attention` on the whole stream. No gradients.

    The chunk that ends a segment writes the segment to memory and empties the cache. Other arguments are as for
    `infini_attention`.

    Args:
        q: [B, t, H, D], before rotary embedding.
        k: [B, t, G, D], before rotary embedding.
        v: [B, t, G, Dv].
        gate: β [H].
        cache: state of the stream before the chunk.
        segment_length: tokens of a segment.

    Returns:
        out [B, t, H, Dv] in v's type, and the cache after the chunk.

    Raises:
        ValueError: shapes, types or values do not fit, or the chunk crosses the end of the current segment.
    """
    check_choice("update_rule", update_rule, UPDATE_RULES)
    check_choice("first_segment", first_segment, FIRST_SEGMENT_MIXES)
    check_eps(eps)
    _check_step(q, k, v, cache, segment_length, rotary)
    check_gate(gate, q)
    check_write_gate(write_gate, k)
    check_normaliser(normaliser, update_rule)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    if cache.memory is None:
        raise ValueError("cache has no memory, but infini_attention_step reads one; use local_attention_step")
    check_memory(cache.memory, k, v, normaliser)

    memory, cache = cache.memory, _append(cache, k, v)
    local = _chunk_attention(q, cache, rotary)  # [B, t, H, Dv]
    dtype = memory_dtype(v.dtype)
    with full_precision(q):
        sigma_q = sigma(q, dtype, feature_map)
        entering = read_state(MemoryState(memory.M.unsqueeze(1), memory.z.unsqueeze(1)), normaliser)
        mixed = read_and_mix(sigma_q.unsqueeze(1), local.unsqueeze(1), gate, entering, first_segment, eps)
        if cache.remaining == 0:
            sigma_k = sigma(cache.keys, dtype, feature_map)  # [B, S, G, D]
            values = remembered_values(cache.values.to(dtype), normaliser)
            strength = write_strength(cache.keys, write_gate, dtype)
            strength = None if strength is None else strength.unsqueeze(1)  # [B, 1, S, G, 1]
            updates = PlainUpdates(sigma_k.unsqueeze(1), values.unsqueeze(1), strength)
            written = SegmentMemory(updates, memory, None, update_rule, eps).carry()
            cache = replace(cache, memory=written.leaving, length=0)
    return mixed.squeeze(1).to(v.dtype), cache


@torch.no_grad()
def local_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: SegmentCache,
    *,
    segment_length: int,
    rotary: Rotary | None = None,
) -> tuple[Tensor, SegmentCache]:
    """Compute the next t tokens of a stream under `local_attention`. No gradients.

    A memory in the cache stays unchanged. Shapes and errors are as for `infini_attention_step`.
    """
    _check_step(q, k, v, cache, segment_length, rotary)
    cache = _append(cache, k, v)
    out = _chunk_attention(q, cache, rotary).to(v.dtype)
    return out, replace(cache, length=0) if cache.remaining == 0 else cache


def _check_step(q: Tensor, k: Tensor, v: Tensor, cache: SegmentCache, segment_length: int, rotary: Rotary | None) -> None:
    check_heads(q, k, v)
    check_segment_length(segment_length)
    check_rotary(rotary, q, segment_length, "segment_length")
    for name, chunk, held in (("k", k, cache.keys), ("v", v, cache.values)):
        needed = [chunk.shape[0], segment_length, *chunk.shape[2:]]
        if list(held.shape) != needed:
            raise ValueError(
                f"the cache holds {list(held.shape)}, but {name} {list(chunk.shape)} and segment_length "
                f"{segment_length} need {needed}"
            )
        if held.dtype != chunk.dtype or held.device != chunk.device:
            raise ValueError(f"the cache holds {held.dtype} on {held.device} but {name} is {chunk.dtype} on {chunk.device}")
    if q.shape[1] > cache.remaining:
        raise ValueError(
            f"q has {q.shape[1]} tokens but {cache.remaining} remain of the current segment "
            f"({cache.length} of segment_length {segment_length} are held): split the chunk there"
        )


def _append(cache: SegmentCache, k: Tensor, v: Tensor) -> SegmentCache:
    end = cache.length + k.shape[1]
    cache.keys[:, cache.length : end] = k
    cache.values[:, cache.length : end] = v
    return replace(cache, length=end)


def _chunk_attention(q: Tensor, cache: SegmentCache, rotary: Rotary | None) -> Tensor:
    """Compute causal attention of the segment's last t tokens over all its tokens so far.

    q [B, t, H, D] -> [B, t, H, Dv]
    """
    end, num_tokens = cache.length, q.shape[1]
    start = end - num_tokens
    k, v = cache.keys[:, :end], cache.values[:, :end]  # [B, n + t, G, ...]
    if rotary is not None:
        cos, sin = rotary
        q, k = apply_rotary(q, cos[start:end], sin[start:end]), apply_rotary(k, cos[:end], sin[:end])
    mask = None
    if num_tokens > 1:
        mask = torch.ones(num_tokens, end, dtype=torch.bool, device=q.device).tril(start)  # [t, n + t]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
