"""Read-back cosines against values computed by hand, with a memory written by the attention operation."""

from __future__ import annotations

import pytest
import torch

from infini_kernels import MemoryState, infini_attention
from infini_train.attention.read_back_cosine import read_back_cosine
from infini_train.config import ModelConfig
from infini_train.measurement.read_back import _Layer


def test_a_single_write_is_read_back_exactly_and_an_empty_memory_returns_zero():
    k, v = torch.randn(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 5, dtype=torch.float64)
    sigma = torch.nn.functional.elu(k) + 1
    memory = MemoryState(torch.einsum("btgd,btge->bgde", sigma, v), sigma[:, 0])
    torch.testing.assert_close(read_back_cosine(k, v, memory, 1e-6), torch.ones(2, 1, 3, dtype=torch.float64))
    empty = MemoryState(torch.zeros(2, 3, 4, 5, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64))
    assert read_back_cosine(k, v, empty, 1e-6).eq(0).all()


def test_softmax_features_read_back_their_own_values():
    """Two values are written under nearly orthogonal keys. Each key reads its own value."""
    k = 4 * torch.eye(2, 4, dtype=torch.float64).view(1, 2, 1, 4)
    v = torch.eye(2, 5, dtype=torch.float64).view(1, 2, 1, 5)
    _, memory = infini_attention(k, k, v, torch.zeros(1), segment_length=2, feature_map="softmax")
    assert read_back_cosine(k, v, memory, 1e-6, feature_map="softmax").min() > 0.999
    assert read_back_cosine(k, v, memory, 1e-6).min() < 0.99


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_cosines_respect_ages_documents_and_padding(feature_map):
    """Row 0 has one document over three segments, the last half padding. Row 1 starts a document in the third segment.

    The micro-batches hold one and two segments.
    """
    torch.manual_seed(0)
    length, groups, width = 4, 2, 3
    k, v = torch.randn(2, 12, groups, width), torch.randn(2, 12, groups, width)
    reset = torch.tensor([[True, False, False], [True, False, True]])
    lengths = torch.tensor([[4, 4, 2], [4, 3, 4]])
    layer, memory = _Layer(ModelConfig(segment_length=length, feature_map=feature_map), rows=[0, 1]), None
    layer.write_gate = torch.randn(groups, width)
    leaving = []
    for segments in (slice(0, 1), slice(1, 3)):
        tokens = slice(segments.start * length, segments.stop * length)
        keywords = {"reset": reset[:, segments], "lengths": lengths[:, segments]}
        options = {"segment_length": length, "feature_map": feature_map}
        output = infini_attention(k[:, tokens], k[:, tokens], v[:, tokens], torch.zeros(groups), memory, **options, **keywords)
        memory = output[1]
        leaving.append(memory)
        layer.observe(torch.nn.Identity(), (k[:, tokens], k[:, tokens], v[:, tokens]), keywords, output)

    def cosines(row, segment, valid, memory, shift):
        tokens = slice(segment * length, segment * length + length)
        keys = k[row : row + 1, tokens].roll(shift, dims=1)
        of_row = MemoryState(memory.M[row : row + 1], memory.z[row : row + 1])
        return read_back_cosine(keys, v[row : row + 1, tokens], of_row, 1e-6, feature_map=feature_map)[0, :valid].double().sum()

    # By age: (row, segment, number of valid tokens, index of the micro-batch whose memory is read).
    expected = {0: [(0, 0, 4, 0), (1, 0, 4, 0), (0, 2, 2, 1), (1, 2, 4, 1)], 1: [(0, 1, 4, 1)], 2: [(0, 0, 4, 1)], 3: []}
    for age, cells in expected.items():
        for column, shift in ((0, 0), (1, length // 2)):
            # In a half-empty segment, all keys half a segment away are padding.
            used = [cell for cell in cells if not shift or cell[2] == length]
            total = sum(cosines(row, segment, valid, leaving[after], shift) for row, segment, valid, after in used)
            torch.testing.assert_close(layer.sums[age, column], torch.as_tensor(total, dtype=torch.float64))
            assert layer.sums[age, 2 + column] == groups * sum(valid for _, _, valid, _ in used)

    strength = 2 * torch.sigmoid((k * layer.write_gate).sum(dim=-1))  # [B, T, G]
    valid = (torch.arange(length) < lengths[..., None]).flatten(1)  # [B, T]
    torch.testing.assert_close(layer.strength[0], strength[valid].double().sum())
    assert layer.strength[1] == groups * lengths.sum()


def test_only_sampled_tokens_are_kept_in_memory():
    """Queries, keys and values share one tensor. A view of it would keep the whole tensor alive."""
    length, segments = 64, 3
    together = torch.randn(2, length * segments, 6, 4)
    q, k, v = together.split([4, 1, 1], dim=2)
    keywords = {"reset": torch.zeros(2, segments, dtype=torch.bool), "lengths": torch.full((2, segments), length)}
    output = infini_attention(q, k, v, torch.zeros(4), segment_length=length, **keywords)
    layer = _Layer(ModelConfig(segment_length=length), rows=[1])
    layer.observe(torch.nn.Identity(), (q, k, v), keywords, output)
    assert len(layer.segments) == segments
    for number, (keys, values, _) in enumerate(layer.segments):
        places = number * length + torch.arange(16) * 4
        assert torch.equal(keys, k[1:, places]) and torch.equal(values, v[1:, places])
        assert keys.untyped_storage().nbytes() == values.untyped_storage().nbytes() == 16 * 4 * 4
    of_row = MemoryState(output[1].M[1:], output[1].z[1:])
    expected = read_back_cosine(*(x[1:, 2 * length :: 4] for x in (k, v)), of_row, 1e-6).double().sum()
    torch.testing.assert_close(layer.sums[0, 0], expected)
