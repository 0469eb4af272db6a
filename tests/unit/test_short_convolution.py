"""The convolution over queries and keys against its definition, in float64 at odd sizes."""

from __future__ import annotations

import pytest
import torch

from infini_train.attention.short_convolution import ShortConvolution
from infini_train.config import ModelConfig, RunConfig
from infini_train.model.parameters import ParameterPlacement, initial_value
from infini_train.training.self_test import tiny_run

B, N, S, G, D = 2, 3, 7, 2, 5


@pytest.fixture(params=[2, 3, 6], ids=lambda width: f"width {width}")
def convolution(request):
    torch.manual_seed(0)
    module = ShortConvolution(ModelConfig(segment_length=S, head_dim=D, short_convolution=request.param), G).double()
    torch.nn.init.normal_(module.weight)
    return module


def drawn(heads: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, N * S, heads, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def filtered(x: torch.Tensor, weight: torch.Tensor, delay: int) -> torch.Tensor:
    """Number by number: out[t] = Σ_i weight[i] x[t - delay - (W - 1 - i)], over tokens of the same segment."""
    width = weight.shape[-1]
    rows = []
    for time in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for place in range(width):
            source = time - delay - (width - 1 - place)
            if source >= time // S * S:
                of_group = [weight[head * G // x.shape[2], :, place] for head in range(x.shape[2])]
                total = total + torch.stack(of_group) * x[:, source]
        rows.append(total)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("heads", [G, 3 * G], ids=lambda heads: f"{heads} query heads")
def test_outputs_and_gradients(convolution, heads):
    q, k = drawn(heads), drawn(G, seed=2)
    weight = convolution.weight
    ours, theirs = convolution(q, k), (filtered(q, weight, 0), filtered(k, weight, 1))
    for mine, other, like in zip(ours, theirs, (q, k), strict=True):
        assert mine.shape == like.shape
        torch.testing.assert_close(mine, other)

    def gradients(outputs):
        return torch.autograd.grad(sum((out * out.sin()).sum() for out in outputs), (q, k, weight))

    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other)


def test_a_last_segment_that_is_short(convolution):
    q, k = drawn(2 * G).detach(), drawn(G, seed=2).detach()
    tokens = 2 * S + 3
    for mine, other in zip(convolution(q[:, :tokens], k[:, :tokens]), convolution(q, k), strict=True):
        torch.testing.assert_close(mine, other[:, :tokens])


@pytest.mark.parametrize("sizes", [(1,) * S, (3, 1, 3), (S,), (2, 5)], ids=str)
def test_chunks_of_a_stream_give_the_same(convolution, sizes):
    q, k = drawn(2 * G).detach(), drawn(G, seed=2).detach()
    expected = convolution(q, k)
    tail, got, start = convolution.empty_tail(B, 2 * G, torch.float64, torch.device("cpu")), [], 0
    for size in sizes * N:
        chunk = slice(start, start + size)
        mixed_q, mixed_k, tail = convolution.step(q[:, chunk], k[:, chunk], tail)
        got.append((mixed_q, mixed_k))
        start += size
    for mine, other in zip((torch.cat(parts, dim=1) for parts in zip(*got, strict=True)), expected, strict=True):
        torch.testing.assert_close(mine, other.detach())


def test_equal_words_have_equal_queries_and_keys(convolution):
    """What it is for: where queries and keys are made alike, a token is found by the words before it, wherever they stand."""
    width = convolution.width
    words, answer = drawn(G).detach()[:, :width], drawn(G, seed=3).detach()[:, :1]
    x = drawn(G, seed=4).detach()
    x[:, : width + 1] = x[:, S : S + width + 1] = torch.cat([words, answer], dim=1)
    q, k = convolution(x, x)
    torch.testing.assert_close(q[:, S + width - 1], k[:, width])


def test_queries_and_keys_keep_their_size_at_the_start():
    name = "decoder.layers.0.self_attention.core_attention.short_convolution.weight"
    drawn = initial_value(ParameterPlacement(name, (4, 64, 9), 0, 1, 0, 1), ModelConfig(init_std=0.02), seed=0)
    assert float(drawn.std()) == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("width", [0, 8])
def test_a_runs_self_test_has_one_if_the_run_does(width):
    assert (tiny_run(RunConfig(model=ModelConfig(short_convolution=width)), 1).model.short_convolution > 0) == (width > 0)
