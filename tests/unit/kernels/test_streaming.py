"""Streaming inference compared with one call on the whole stream."""

import pytest
import torch
from torch import Tensor

from infini_kernels import SegmentCache, infini_attention, infini_attention_step, local_attention, local_attention_step

S, H, G, D, DV = 5, 4, 2, 4, 3


def stream(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((H, D), (G, D), (G, DV))
    tensors = [torch.randn(2, tokens, *shape, generator=generator).to(dtype) for shape in shapes]
    angle = torch.arange(S)[:, None] / 3.0 ** torch.arange(D // 2)
    return tensors, torch.randn(H, generator=generator).to(dtype), (angle.cos().to(dtype), angle.sin().to(dtype))


def chunks_of(tokens: int, longest: int) -> list[tuple[int, int]]:
    """Return spans of at most `longest` tokens that end at every segment's end."""
    spans, start = [], 0
    while start < tokens:
        end = min(start + longest, (start // S + 1) * S, tokens)
        spans.append((start, end))
        start = end
    return spans


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("longest", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "update_rule, first_segment, normaliser, feature_map",
    [
        ("linear", "paper", "paper", "elu"),
        ("delta", "local_only", "paper", "elu"),
        ("delta", "paper", "corrected", "elu"),
        ("linear", "paper", "paper", "softmax"),
    ],
)
def test_chunks_of_any_size_equal_one_call(
    update_rule: str,
    first_segment: str,
    normaliser: str,
    feature_map: str,
    longest: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    tensors, gate, rotary = stream(17, dtype)
    options = {
        "segment_length": S,
        "update_rule": update_rule,
        "rotary": rotary,
        "first_segment": first_segment,
        "normaliser": normaliser,
        "feature_map": feature_map,
        "write_gate": None if first_segment == "local_only" else torch.randn(G, D, generator=torch.Generator().manual_seed(3)),
    }
    wanted, _ = infini_attention(*tensors, gate, **options)
    _, wanted_memory = infini_attention(*(x[:, :15] for x in tensors), gate, **options)  # of finished segments only

    cache = SegmentCache.empty(2, S, G, D, DV, normaliser=normaliser, dtype=dtype)
    outs = []
    for start, end in chunks_of(17, longest):
        assert cache.remaining >= end - start
        out, cache = infini_attention_step(*(x[:, start:end] for x in tensors), gate, cache, **options)
        outs.append(out)
    assert cache.length == 2
    torch.testing.assert_close(torch.cat(outs, dim=1), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache.memory, wanted_memory, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("longest", [1, 3, 5])
def test_local_chunks_equal_one_call(longest: int) -> None:
    tensors, _, rotary = stream(17)
    wanted = local_attention(*tensors, segment_length=S, rotary=rotary)
    cache = SegmentCache.empty(2, S, G, D, DV, with_memory=False, dtype=torch.float64)
    outs = []
    for start, end in chunks_of(17, longest):
        out, cache = local_attention_step(*(x[:, start:end] for x in tensors), cache, segment_length=S, rotary=rotary)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), wanted, rtol=1e-10, atol=1e-10)


def test_cache_size_does_not_grow() -> None:
    tensors, gate, _ = stream(50 * S + 1, torch.bfloat16)
    cache = SegmentCache.empty(2, S, G, D, DV, dtype=torch.bfloat16)

    def storage(cache: SegmentCache) -> list[int]:
        assert cache.memory is not None
        return [x.untyped_storage().nbytes() for x in (*cache.memory, cache.keys, cache.values)]

    size, buffers = storage(cache), (cache.keys.data_ptr(), cache.values.data_ptr())
    for start, end in chunks_of(50 * S + 1, 2):
        out, cache = infini_attention_step(*(x[:, start:end] for x in tensors), gate, cache, segment_length=S)
        assert storage(cache) == size and (cache.keys.data_ptr(), cache.values.data_ptr()) == buffers
    assert out.dtype == torch.bfloat16 and cache.memory is not None and cache.memory.z.dtype == torch.float32


def test_clone_is_independent() -> None:
    tensors, gate, _ = stream(12)
    cache = SegmentCache.empty(2, S, G, D, DV, dtype=torch.float64)
    for start, end in chunks_of(7, 5):
        _, cache = infini_attention_step(*(x[:, start:end] for x in tensors), gate, cache, segment_length=S)
    branch = cache.clone()
    for start, end in ((7, 10), (10, 12)):
        _, cache = infini_attention_step(*(x[:, start:end] for x in tensors), gate, cache, segment_length=S)
    again, _ = infini_attention_step(*(x[:, 7:10] for x in tensors), gate, branch, segment_length=S)
    torch.testing.assert_close(again, infini_attention(*tensors, gate, segment_length=S)[0][:, 7:10])


def test_chunk_beyond_the_segment_is_refused_and_cache_is_unchanged() -> None:
    tensors, gate, _ = stream(12)
    cache = SegmentCache.empty(2, S, G, D, DV, dtype=torch.float64)
    _, cache = infini_attention_step(*(x[:, :3] for x in tensors), gate, cache, segment_length=S)
    held = cache.keys.clone()
    with pytest.raises(ValueError, match=r"q has 3 tokens but 2 remain .* \(3 of segment_length 5"):
        infini_attention_step(*(x[:, 3:6] for x in tensors), gate, cache, segment_length=S)
    with pytest.raises(ValueError, match="q has 3 tokens but 2 remain"):
        local_attention_step(*(x[:, 3:6] for x in tensors), cache, segment_length=S)
    assert torch.equal(cache.keys, held)


def test_cache_of_other_sizes_is_refused() -> None:
    tensors, gate, _ = stream(3)
    with pytest.raises(ValueError, match=r"the cache holds \[2, 6, 2, 4\], but k .* need \[2, 5, 2, 4\]"):
        infini_attention_step(*tensors, gate, SegmentCache.empty(2, 6, G, D, DV, dtype=torch.float64), segment_length=S)
    with pytest.raises(ValueError, match=r"the cache holds torch.float32 .* but k is torch.float64"):
        infini_attention_step(*tensors, gate, SegmentCache.empty(2, S, G, D, DV), segment_length=S)
    without = SegmentCache.empty(2, S, G, D, DV, with_memory=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="cache has no memory"):
        infini_attention_step(*tensors, gate, without, segment_length=S)
