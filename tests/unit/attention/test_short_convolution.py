"""The convolution over queries and keys against its definition, in float64 and at odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infini_train.attention.short_convolution import ShortConvolution
from infini_train.config import ModelConfig, RunConfig
from infini_train.model.parameter_placement import ParameterPlacement, initial_value
from infini_train.training.self_test import tiny_run

B, N, S, G, D = 2, 3, 7, 2, 5
MODEL = ModelConfig(segment_length=S, num_attention_heads=2 * G, num_query_groups=G, head_dim=D)
NO_RESET = torch.zeros(B, N, dtype=torch.bool)


@pytest.fixture(params=["segment", "document"])
def reach(request):
    return request.param


@pytest.fixture(params=[2, 3, 6], ids=lambda width: f"width {width}")
def convolution(request, reach):
    torch.manual_seed(0)
    module = ShortConvolution(replace(MODEL, short_convolution=request.param, short_convolution_reach=reach), G).double()
    torch.nn.init.normal_(module.weight)
    return module


def drawn(heads: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, N * S, heads, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def filtered(x: torch.Tensor, weight: torch.Tensor, delay: int, reset: torch.Tensor, reach: str) -> torch.Tensor:
    """Compute out[t] = Σ_i weight[i] x[t - delay - (W - 1 - i)] over tokens of the same segment or document, in plain loops."""
    width = weight.shape[-1]
    rows = []
    for row in range(x.shape[0]):
        times = []
        for time in range(x.shape[1]):
            starts = range(time // S + 1) if reach == "document" else [time // S]
            start = max(segment * S for segment in starts if reset[row, segment] or segment == starts[0])
            total = torch.zeros_like(x[row, 0])
            for place in range(width):
                source = time - delay - (width - 1 - place)
                if source >= start:
                    of_group = [weight[head * G // x.shape[2], :, place] for head in range(x.shape[2])]
                    total = total + torch.stack(of_group) * x[row, source]
            times.append(total)
        rows.append(torch.stack(times))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [G, 3 * G], ids=lambda heads: f"{heads} query heads")
@pytest.mark.parametrize("resets", [[], [(0, 1)], [(0, 0), (0, 2), (1, 1), (1, 2)]], ids=str)
def test_outputs_and_gradients(convolution, reach, heads, resets):
    q, k = drawn(heads), drawn(G, seed=2)
    weight, reset = convolution.weight, NO_RESET.clone()
    for place in resets:
        reset[place] = True
    *ours, tail = convolution(q, k, reset)
    assert (tail is not None) == (reach == "document")
    theirs = filtered(q, weight, 0, reset, reach), filtered(k, weight, 1, reset, reach)
    for mine, other, like in zip(ours, theirs, (q, k), strict=True):
        assert mine.shape == like.shape
        torch.testing.assert_close(mine, other)

    def gradients(outputs):
        return torch.autograd.grad(sum((out * out.sin()).sum() for out in outputs), (q, k, weight))

    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other)


def test_a_short_last_segment(convolution):
    q, k = drawn(2 * G).detach(), drawn(G, seed=2).detach()
    tokens = 2 * S + 3
    short, whole = convolution(q[:, :tokens], k[:, :tokens], NO_RESET), convolution(q, k, NO_RESET)
    for mine, other in zip(short[:2], whole[:2], strict=True):
        torch.testing.assert_close(mine, other[:, :tokens])


@pytest.mark.parametrize("reset_between", [False, True])
def test_two_micro_batches_equal_one_call(convolution, reach, reset_between):
    """Outputs, the final tail and, through the tail between the micro-batches, every gradient are equal."""
    q, k, cut = drawn(2 * G), drawn(G, seed=2), 2 * S
    reset = NO_RESET.clone()
    reset[0, 2] = reset_between
    whole = convolution(q, k, reset)
    first = convolution(q[:, :cut], k[:, :cut], reset[:, :2])
    second = convolution(q[:, cut:], k[:, cut:], reset[:, 2:], first[2])
    joined = [torch.cat(both, dim=1) for both in zip(first[:2], second[:2], strict=True)]
    if reach == "document":
        assert whole[2].shape == (B, *ShortConvolution.carried(replace(MODEL, short_convolution=convolution.width)).shape)
        joined.append(second[2])
    whole = [each for each in whole if each is not None]
    for mine, other in zip(joined, whole, strict=True):
        torch.testing.assert_close(mine, other)

    def gradients(outputs):
        return torch.autograd.grad(sum((out * out.sin()).sum() for out in outputs), (q, k, convolution.weight))

    for mine, other in zip(gradients(joined), gradients(whole), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("sizes", [(1,) * S, (3, 1, 3), (S,), (2, 5)], ids=str)
def test_streaming_in_chunks_equals_one_call(convolution, sizes):
    q, k = drawn(2 * G).detach(), drawn(G, seed=2).detach()
    expected = convolution(q, k, NO_RESET)[:2]
    tail, got, start = convolution.empty_tail(B, 2 * G, torch.float64, torch.device("cpu")), [], 0
    for size in sizes * N:
        chunk = slice(start, start + size)
        mixed_q, mixed_k, tail = convolution.step(q[:, chunk], k[:, chunk], tail)
        got.append((mixed_q, mixed_k))
        start += size
    for mine, other in zip((torch.cat(chunks, dim=1) for chunks in zip(*got, strict=True)), expected, strict=True):
        torch.testing.assert_close(mine, other.detach())


def test_equal_words_have_equal_queries_and_keys(convolution):
    """With equal inputs for queries and keys, the words before a token retrieve it at every position."""
    width = convolution.width
    words, answer = drawn(G).detach()[:, :width], drawn(G, seed=3).detach()[:, :1]
    x = drawn(G, seed=4).detach()
    x[:, : width + 1] = x[:, S : S + width + 1] = torch.cat([words, answer], dim=1)
    q, k, _ = convolution(x, x, NO_RESET)
    torch.testing.assert_close(q[:, S + width - 1], k[:, width])


def test_initial_filters_keep_the_scale_of_queries_and_keys():
    name = "decoder.layers.0.self_attention.core_attention.short_convolution.weight"
    drawn = initial_value(ParameterPlacement(name, (4, 64, 9), 0, 1, 0, 1), ModelConfig(init_std=0.02), seed=0)
    assert float(drawn.std()) == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("width", [0, 8])
def test_the_self_test_uses_a_convolution_if_the_run_does(width):
    assert (tiny_run(RunConfig(model=ModelConfig(short_convolution=width)), 1).model.short_convolution > 0) == (width > 0)
