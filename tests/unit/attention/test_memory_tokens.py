"""Baselines whose memory is tokens: their attention masks, and which earlier tokens influence which loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infini_train.attention import build_attention
from infini_train.attention.rivals.memory_tokens import MemoryTokens
from infini_train.config import DataConfig, ModelConfig, RunConfig
from infini_train.model.flops import training_flops_per_token
from infini_train.model.layer_context import LayerContext
from infini_train.model.memory_token_layers import by_segment
from infini_train.reference.plain_model import token_losses

S, P, N = 4, 2, 4


def run(attention: str) -> RunConfig:
    model = ModelConfig(
        attention=attention,
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        head_dim=4,
        ffn_hidden_size=12,
        segment_length=S,
        memory_tokens=P,
    )
    return RunConfig(model=model, data=DataConfig(vocab_size=64))


@pytest.mark.parametrize("valid", [1, 3, 4])
def test_recurrent_memory_is_causal_around_the_segment(valid):
    seen = build_attention(run("recurrent_memory").model, 1, 2, 1, S).attention_mask(torch.tensor([valid]))[0, 0]
    kinds = ["read"] * P + ["token"] * valid + ["padding"] * (S - valid) + ["write"] * P
    for i, query in enumerate(kinds):
        for j, key in enumerate(kinds):
            if query != "padding":
                assert bool(seen[i, j]) == (j <= i and key != "padding"), (i, j)
        assert seen[i].any()


@pytest.mark.parametrize("valid", [1, 3, 4])
def test_feedback_attends_to_the_whole_segment_and_all_tokens_attend_to_it(valid):
    seen = build_attention(run("feedback").model, 1, 2, 1, S).attention_mask(torch.tensor([valid]))[0, 0]
    kinds = ["token"] * valid + ["padding"] * (S - valid) + ["feedback"] * P
    for i, query in enumerate(kinds):
        for j, key in enumerate(kinds):
            if query == "token":
                assert bool(seen[i, j]) == (key == "feedback" or (key == "token" and j <= i)), (i, j)
            elif query == "feedback":
                assert bool(seen[i, j]) == (key != "padding"), (i, j)
        assert seen[i].any()


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    model, generator = config.model, torch.Generator().manual_seed(0)
    h, heads, width = model.hidden_size, model.num_attention_heads, model.head_dim
    shapes = {
        "embedding.word_embeddings.weight": (config.data.vocab_size, h),
        "output_layer.weight": (config.data.vocab_size, h),
    }
    shapes["decoder.final_layernorm.weight"] = (h,)
    if model.attention == "recurrent_memory":
        shapes["memory_tokens"] = (P, h)
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= {prefix + name: (h,) for name in ("input_layernorm.weight", "pre_mlp_layernorm.weight")}
        shapes |= {
            prefix + "self_attention.linear_qkv.weight": ((heads + 2) * width, h),
            prefix + "self_attention.linear_proj.weight": (h, heads * width),
            prefix + "mlp.linear_fc1.weight": (2 * model.ffn_hidden_size, h),
            prefix + "mlp.linear_fc2.weight": (h, model.ffn_hidden_size),
        }
        if model.attention == "feedback":
            shapes[prefix + "memory_tokens"] = (P, h)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("attention", ["recurrent_memory", "feedback"])
def test_a_token_influences_only_later_tokens_of_its_document(attention):
    """Every position has a unique token id, so the gradient of its embedding shows whether it influenced a loss."""
    config = run(attention)
    weights = weights_of(config)
    embedding = weights["embedding.word_embeddings.weight"].requires_grad_()
    tokens = torch.arange(N * S).unsqueeze(0)
    batch = SimpleNamespace(
        tokens=tokens,
        targets=torch.full_like(tokens, 63),
        reset=torch.tensor([[True, False, True, False]]),
        lengths=torch.tensor([[S, S - 1, S, S]]),
    )
    losses = token_losses(config, weights, batch, {})[0]
    padding = [2 * S - 1]
    for t in range(N * S):
        if t in padding:
            continue
        (gradient,) = torch.autograd.grad(losses[t], embedding, retain_graph=True)
        reached = gradient[: N * S].abs().sum(dim=1) > 0
        document = range(2 * S) if t < 2 * S else range(2 * S, N * S)
        for earlier in range(N * S):
            expected = earlier in document and earlier <= t and earlier not in padding
            assert bool(reached[earlier]) == expected, (t, earlier)


def test_a_row_emptied_inside_a_document_continues_from_the_initial_memory():
    """A skipped step and a rollback empty memories of all kinds with zeros."""
    initial = torch.randn(P, 8)
    carried = torch.stack([torch.zeros(P, 8), torch.randn(P, 8)])
    seen = []

    def run_segment(tokens: torch.Tensor, memory: torch.Tensor, _: LayerContext) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(memory)
        return tokens, memory + 1

    batch = LayerContext(
        reset=torch.zeros(2, 2, dtype=torch.bool), lengths=torch.full((2, 2), S), memory_in={1: MemoryTokens(carried)}
    )
    by_segment(torch.zeros(2 * S, 2, 8), initial, batch, 1, run_segment)
    expected = torch.stack([initial, carried[1]], dim=1)
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected + 1)


@pytest.mark.parametrize("attention,triangle", [("recurrent_memory", S + 2 * P), ("feedback", S)])
def test_flops_include_the_memory_tokens(attention, triangle):
    """Matrix products are counted during execution, and query-key pairs in the mask."""
    config = run(attention)
    tokens = torch.zeros(1, N * S, dtype=torch.int64)
    batch = SimpleNamespace(
        tokens=tokens, targets=tokens, reset=torch.tensor([[True] + [False] * (N - 1)]), lengths=torch.full((1, N), S)
    )
    with FlopCounterMode(display=False) as counter:
        token_losses(config, weights_of(config), batch, {})
    matrices = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    model = config.model
    seen = int(build_attention(model, 1, 2, 1, S).attention_mask(torch.tensor([S])).sum())
    pairs = seen - triangle / 2  # under causal attention, a token's pair with itself counts half
    attended = 2 * 2 * model.num_attention_heads * model.head_dim * pairs * N * model.num_layers
    assert training_flops_per_token(config) * N * S == pytest.approx(3 * (matrices + attended))
