"""Baseline attentions against loops over row, head and token in float64: outputs, every gradient, and the carried state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infini_train.attention import ATTENTION_VARIANTS, build_attention, detached, map_tensors, state_numbers
from infini_train.attention import kernel_choice as kernels
from infini_train.attention.rivals.linear_attention import running_sum
from infini_train.config import ModelConfig
from infini_train.model.layer_context import empty_memory

B, N, S, H, G, D = 2, 5, 3, 4, 2, 6
T = N * S
RIVALS = ["window", "transformer_xl", "memorizing", "linear"]
# Row 0: a document of 7 tokens, then one of 5. Row 1: continues a document; a new one begins at the second segment.
RESET = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])
LENGTHS = torch.tensor([[3, 3, 1, 3, 2], [2, 3, 3, 3, 3]])


def model(attention: str, **keys: int) -> ModelConfig:
    sizes = {
        "segment_length": S,
        "num_attention_heads": H,
        "num_query_groups": G,
        "head_dim": D,
        "num_layers": 1,
        "hidden_size": 32,
    }
    return ModelConfig(attention=attention, bank_tokens=4, bank_top_k=2, memory_tokens=5, initial_gate=0.3, **{**sizes, **keys})


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, heads, D) for heads in (H, G, G))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def rotated(x: Tensor, position: int, base: float) -> Tensor:
    half = D // 2
    angle = position * base ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((turned.real, turned.imag))


def documents(row: int) -> list[list[int]]:
    """Return the token positions of each document in a row."""
    found: list[list[int]] = [[]]
    for segment in range(N):
        if RESET[row, segment]:
            found.append([])
        found[-1] += range(segment * S, segment * S + int(LENGTHS[row, segment]))
    return found


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.softmax(torch.stack([query @ key / D**0.5 for key in keys]), dim=0) @ torch.stack(values)


def segments_of(document: list[int]) -> list[int]:
    return [place // S for place in document]


def near(q: Tensor, k: Tensor, v: Tensor, document: list[int], t: int, base: float, *, window: bool) -> Tensor:
    """Compute a token's attention over its own and the previous segment; t is the token's index in its document."""
    segment, keys, values = document[t] // S, [], []
    for s in range(t + 1):
        other = document[s] // S
        distance = t - s
        if other == segment or (distance < S if window else other == segment - 1):
            cut = other != segment and not window
            keys.append(rotated((k[document[s]].detach() if cut else k[document[s]]), -distance, base))
            values.append(v[document[s]].detach() if cut else v[document[s]])
    return softmax_read(q[document[t]], keys, values)


def memorized(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, document: list[int], t: int, config: ModelConfig) -> Tensor:
    local = near(q, k, v, document, t, config.rotary_base, window=False)
    old = [s for s in range(t) if document[s] // S < document[t] // S][-config.bank_tokens :]
    if not old:
        return local
    scores = [float((q[document[t]] @ k[document[s]]).detach()) for s in old]
    best = sorted(range(len(old)), key=lambda i: -scores[i])[: config.bank_top_k]
    places = [document[old[i]] for i in best]
    far = softmax_read(q[document[t]], [k[p].detach() for p in places], [v[p].detach() for p in places])
    return gate.sigmoid() * far + (1 - gate.sigmoid()) * local


def linear(q: Tensor, k: Tensor, v: Tensor, document: list[int], t: int, config: ModelConfig) -> Tensor:
    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    query = phi(q[document[t]])
    seen = document[: t + 1]
    scores = [rotated(query, t, config.rotary_base) @ rotated(phi(k[p]), s, config.rotary_base) for s, p in enumerate(seen)]
    total = sum(query @ phi(k[p]) for p in seen) + config.memory_eps
    return sum(score * v[p] for score, p in zip(scores, seen, strict=True)) / total


def oracle(config: ModelConfig, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            queries, keys, values = q[b, :, h], k[b, :, h // (H // G)], v[b, :, h // (H // G)]
            for document in documents(b):
                for t, place in enumerate(document):
                    if config.attention == "linear":
                        mixed = linear(queries, keys, values, document, t, config)
                    elif config.attention == "memorizing":
                        mixed = memorized(queries, keys, values, gate[h], document, t, config)
                    else:
                        window = config.attention == "window"
                        mixed = near(queries, keys, values, document, t, config.rotary_base, window=window)
                    out[b, place, h] = mixed
    return out


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.fixture(params=RIVALS)
def rival(request):
    config = model(request.param)
    return build_attention(config, 1, H, G, T).double()


def leaves(rival, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [q, k, v, *rival.parameters()]


def test_outputs_and_gradients_equal_the_oracle(rival):
    q, k, v = drawn()
    out, _ = rival(q, k, v, reset=RESET, lengths=LENGTHS, memory=None)
    expected = oracle(rival.model, q, k, v, getattr(rival, "gate", None))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = gradients((out * weights).sum(), leaves(rival, q, k, v))
    theirs = gradients((expected * weights).sum(), leaves(rival, q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_micro_batches_equal_one_call(rival, cut):
    q, k, v = drawn(2)
    whole, leaving = rival(q, k, v, reset=RESET, lengths=LENGTHS, memory=None)
    outputs, memory = [], None
    for start, end in ((0, cut), (cut, N)):
        token = slice(start * S, end * S)
        segment = slice(start, end)
        out, memory = rival(
            q[:, token], k[:, token], v[:, token], reset=RESET[:, segment], lengths=LENGTHS[:, segment], memory=memory
        )
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    for mine, other in zip(memory, leaving, strict=True):
        torch.testing.assert_close(mine, other)
    # Gradients through the carried state equal those of the single call.
    ours = gradients(torch.cat(outputs, dim=1).square().sum(), leaves(rival, q, k, v))
    theirs = gradients(whole.square().sum(), leaves(rival, q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_forward_does_not_modify_its_incoming_memory(rival):
    q, k, v = drawn(3)
    _, memory = rival(q, k, v, reset=RESET, lengths=LENGTHS, memory=None)
    memory = detached(memory)
    kept = map_tensors(torch.clone, memory)
    rival(q, k, v, reset=torch.zeros_like(RESET), lengths=LENGTHS, memory=memory)
    for mine, other in zip(memory, kept, strict=True):
        assert torch.equal(mine, other)


def test_streaming_equals_one_call(rival):
    q, k, v = (x.detach() for x in drawn(4))
    none = torch.zeros(B, N, dtype=torch.bool)
    expected, _ = rival(q, k, v, reset=none, lengths=torch.full((B, N), S), memory=None)
    cache, got, start = rival.new_cache(B, torch.float64, torch.device("cpu")), [], 0
    for size in (1, 2, 3, 2, 1, 1, 1, 1, 3):
        assert size <= cache.remaining
        token = slice(start, start + size)
        out, cache = rival.step(q[:, token], k[:, token], v[:, token], cache)
        got.append(out)
        start += size
    torch.testing.assert_close(torch.cat(got, dim=1), expected.detach())


def test_carried_state_has_the_declared_shape_and_size(rival):
    q, k, v = (x.float().detach() for x in drawn(5))
    single = build_attention(rival.model, 1, H, G, T)
    _, memory = single(q, k, v, reset=RESET, lengths=LENGTHS, memory=None)
    empty = empty_memory(rival.model, [1], B, 1, None)[1]
    assert type(memory) is type(empty)
    for mine, declared in zip(memory, empty, strict=True):
        assert mine.shape == declared.shape and mine.dtype == declared.dtype
    numbers = sum(field[0].numel() for field in memory if field.is_floating_point())
    assert state_numbers(rival.model) == numbers


SIZES: dict[str, Callable[[int], int]] = {
    "infini": lambda layers: D * (D + 1) * G * layers,
    "linear": lambda layers: D * (D + 1) * G * layers,
    "transformer_xl": lambda layers: 2 * D * G * S * layers,
    "window": lambda layers: 2 * D * G * S * layers,
    "memorizing": lambda layers: 2 * D * G * S * layers + 2 * D * G * 4,
    "recurrent_memory": lambda layers: 5 * 32,
    "feedback": lambda layers: 5 * 32 * layers,
    "local": lambda layers: 0,
    "full": lambda layers: 0,
}


@pytest.mark.parametrize("attention", SIZES)
@pytest.mark.parametrize("layers", [1, 4])
def test_state_sizes_equal_the_papers_table(attention, layers):
    assert state_numbers(model(attention, num_layers=layers)) == SIZES[attention](layers)


def test_deterministic_running_sum_equals_cumsum() -> None:
    x = torch.randn(2, 3, 37, 5, dtype=torch.float64)
    torch.testing.assert_close(running_sum(x, same_bits=True), running_sum(x, same_bits=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTION_VARIANTS)
def test_description_names_the_attention_kernel_in_use(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "local_attention_choice", lambda *_: "flash_attn 2.8.3")
    description = kernels.describe_kernels(ModelConfig(attention=attention), torch.bfloat16, torch.device("cpu"))
    uses_kernel = attention in ("infini", "local", "full")
    assert description.startswith("attention: flash_attn 2.8.3" if uses_kernel else f"attention: PyTorch {torch.__version__}")
