"""Infini-attention compared with its oracle, and the properties that training relies on."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_kernels import MemoryState, infini_attention, local_attention
from tests.unit.kernels.test_oracle import oracle, valid_by_segment

NAMES = ("q", "k", "v", "gate", "M", "z", "write_gate")


@dataclass(frozen=True)
class Case:
    tokens: int
    segment: int = 5
    heads: int = 4
    groups: int = 2
    key_width: int = 4
    value_width: int = 4
    rule: str = "linear"
    memory: bool = True
    rotary: bool = True
    reset: tuple[tuple[int, ...], ...] | None = None
    lengths: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    first_segment: str = "paper"
    batch: int = 2
    eps: float = 1e-6
    write_gate: bool = False
    normaliser: str = "paper"
    feature_map: str = "elu"

    def options(self, dtype: torch.dtype) -> dict[str, object]:
        rotary = None
        if self.rotary:
            angle = torch.arange(self.segment)[:, None] / 3.0 ** torch.arange(self.key_width // 2)  # [S, D/2]
            rotary = (angle.cos().to(dtype), angle.sin().to(dtype))
        return {
            "segment_length": self.segment,
            "update_rule": self.rule,
            "rotary": rotary,
            "reset": None if self.reset is None else torch.tensor(self.reset, dtype=torch.bool),
            "lengths": None if self.lengths is None else torch.tensor(self.lengths),
            "first_segment": self.first_segment,
            "eps": self.eps,
            "normaliser": self.normaliser,
            "feature_map": self.feature_map,
        }

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return inputs that float32 represents exactly, so that one oracle serves both types."""
        generator = torch.Generator().manual_seed(self.tokens)
        shapes = {
            "q": (self.batch, self.tokens, self.heads, self.key_width),
            "k": (self.batch, self.tokens, self.groups, self.key_width),
            "v": (self.batch, self.tokens, self.groups, self.value_width),
            "gate": (self.heads,),
            "M": (self.batch, self.groups, self.key_width, self.value_width + (self.normaliser == "corrected")),
            "z": (self.batch, self.groups, self.key_width),
            "write_gate": (self.groups, self.key_width),
        }
        values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        values["z"] = values["z"].abs() + 1  # a sum of σ(K) is positive
        if self.normaliser == "corrected":
            values["M"][..., -1] = values["z"] / 2  # and so is the result of the rule for values of 1
        if not self.write_gate:
            del values["write_gate"]
        if not self.memory:
            del values["M"], values["z"]
        return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


CASES = {
    "one token": Case(1),
    "one token, no memory": Case(1, memory=False, rule="delta"),
    "one full segment": Case(5, rule="delta"),
    "one full segment, no memory": Case(5, memory=False, value_width=3),
    "one full segment, no memory, local only": Case(5, memory=False, first_segment="local_only"),
    "partial last segment": Case(7, value_width=3),
    "partial last segment, delta": Case(13, value_width=6, rule="delta"),
    "shorter than a segment": Case(3, rule="delta", lengths=(3, 1)),
    "three segments, no memory, local only": Case(13, memory=False, first_segment="local_only", rule="delta"),
    "one group": Case(15, heads=6, groups=1, value_width=2, rule="delta"),
    "a group per head, no rotary, odd width": Case(13, heads=3, groups=3, key_width=3, rotary=False),
    "resets": Case(13, reset=((0, 1, 0), (1, 0, 1))),
    "resets, delta, local only": Case(15, reset=((0, 1, 0), (1, 0, 1)), rule="delta", first_segment="local_only"),
    "resets, no memory": Case(15, reset=((0, 0, 1), (1, 1, 0)), memory=False),
    "row lengths": Case(13, lengths=(13, 6), value_width=3),
    "row lengths, one row empty": Case(13, lengths=(0, 11), rule="delta", memory=False),
    "segment lengths": Case(13, lengths=((5, 2, 3), (0, 4, 1)), rule="delta"),
    "segment lengths, resets, local only": Case(
        13, lengths=((3, 5, 2), (5, 0, 3)), reset=((0, 1, 0), (0, 1, 1)), value_width=3, first_segment="local_only"
    ),
    "segment lengths, resets, delta": Case(
        15, heads=6, groups=1, lengths=((3, 5, 2), (5, 0, 3)), reset=((0, 1, 0), (0, 1, 1)), rule="delta", memory=False
    ),
    "large eps": Case(7, rule="delta", eps=0.5),
    "learned writes": Case(13, write_gate=True, lengths=((5, 2, 3), (0, 4, 1)), value_width=3),
    "learned writes, delta": Case(13, write_gate=True, rule="delta", reset=((0, 1, 0), (1, 0, 1)), heads=6, groups=3),
    "learned writes, one segment": Case(4, write_gate=True, rule="delta", memory=False),
    "corrected normaliser": Case(13, rule="delta", normaliser="corrected", lengths=((3, 5, 2), (5, 0, 3)), value_width=3),
    "corrected normaliser, local only, learned writes": Case(
        22,
        rule="delta",
        normaliser="corrected",
        memory=False,
        first_segment="local_only",
        write_gate=True,
        reset=((0, 0, 1, 0, 0),) * 2,
    ),
    "sharp features": Case(13, feature_map="softmax", lengths=((5, 2, 3), (0, 4, 1)), reset=((0, 1, 0), (1, 0, 1))),
    "sharp features, all that is beyond the paper": Case(
        13, heads=6, groups=3, rule="delta", feature_map="softmax", normaliser="corrected", write_gate=True, value_width=3
    ),
}


def loss_of(out: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """Return a random projection of all results of the operation."""
    generator = torch.Generator().manual_seed(99)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in (out, M, z))


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


def with_gradients(results: tuple[Tensor, Tensor, Tensor], inputs: dict[str, Tensor]) -> Results:
    gradients = torch.autograd.grad(loss_of(*results), list(inputs.values()), allow_unused=True)
    return (
        dict(zip(("out", "M", "z"), (x.detach() for x in results), strict=True)),
        {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), gradients, strict=True)},
    )


@functools.cache
def expected(name: str) -> Results:
    inputs = CASES[name].inputs(torch.float64)
    return with_gradients(oracle(**inputs, **CASES[name].options(torch.float64)), inputs)


def call(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    memory = MemoryState(inputs["M"], inputs["z"]) if "M" in inputs else None
    out, memory = infini_attention(
        *(inputs[name] for name in NAMES[:4]), memory, write_gate=inputs.get("write_gate"), **options
    )
    return out, memory.M, memory.z


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("name", CASES)
def test_results_and_every_gradient_agree_with_the_oracle(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = CASES[name].inputs(dtype)
    results = call(inputs, **CASES[name].options(dtype))
    assert {x.dtype for x in results} == {dtype}
    values, gradients = with_gradients(results, inputs)
    for kind, actual, wanted in zip(("result", "gradient"), (values, gradients), expected(name), strict=True):
        for key, value in wanted.items():
            scale = max(1.0, value.abs().max().item())
            error = (actual[key].double() - value).abs().max().item() / scale
            assert error < tolerance, f"{kind} of {key} is off by {error:.1e} of its scale"


def test_cases_cover_the_gradient_of_every_input() -> None:
    """Each input has a gradient far from zero in some case, so that a missing gradient is detected."""
    for name in NAMES:
        case = "learned writes" if name == "write_gate" else "segment lengths"
        assert expected(case)[1][name].abs().max() > 1e-2


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_gradcheck(update_rule: str) -> None:
    inputs = Case(5, segment=2, heads=2, groups=1, key_width=2, value_width=3, batch=1).inputs(torch.float64)

    def operation(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return call(dict(zip(inputs, tensors, strict=True)), segment_length=2, update_rule=update_rule)

    assert torch.autograd.gradcheck(operation, tuple(inputs.values()))


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("position", [1, 4, 5, 8, 12])
def test_causality(update_rule: str, position: int) -> None:
    case = Case(13, rule=update_rule)
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    before = call(inputs, **options)[0]
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for name in ("q", "k", "v"):
        changed[name][:, position:] += 3
    after = call(changed, **options)[0]
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
    assert (after[:, position:] - before[:, position:]).abs().amax(dim=(2, 3)).min() > 1e-3


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_three_windows_equal_one_call_with_gradients(update_rule: str) -> None:
    case = Case(25, rule=update_rule, reset=((0, 0, 1, 0, 0), (0, 1, 0, 0, 0)), lengths=(25, 18))
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    one_values, one_gradients = with_gradients(call(inputs, **options), inputs)

    reset, lengths = options.pop("reset"), options.pop("lengths")
    assert isinstance(reset, Tensor) and isinstance(lengths, Tensor)
    pieces, memory = [], MemoryState(inputs["M"], inputs["z"])
    for start, end in ((0, 2), (2, 3), (3, 5)):
        first, last = 5 * start, 5 * end
        out, memory = infini_attention(
            *(inputs[name][:, first:last] for name in ("q", "k", "v")),
            inputs["gate"],
            memory,
            reset=reset[:, start:end],
            lengths=(lengths - first).clamp(0, last - first),
            **options,
        )
        pieces.append(out)
    values, gradients = with_gradients((torch.cat(pieces, dim=1), *memory), inputs)
    for name, value in one_values.items():
        torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in one_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=25, deadline=None)
@given(
    segment=st.integers(1, 6),
    segments=st.integers(1, 5),
    tail=st.integers(0, 5),
    split=st.integers(0, 5),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    rule=st.sampled_from(("linear", "delta")),
    first_segment=st.sampled_from(("paper", "local_only")),
)
def test_call_split_at_any_segment_start_equals_one_call(
    segment: int, segments: int, tail: int, split: int, groups: int, repeats: int, rule: str, first_segment: str
) -> None:
    tokens = segment * segments + tail % segment
    cut = segment * min(max(split, 1), segments)
    case = Case(tokens, segment, groups * repeats, groups, rule=rule, memory=False, first_segment=first_segment)
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    q, k, v, gate = (inputs[name].detach() for name in NAMES[:4])
    whole, whole_memory = infini_attention(q, k, v, gate, **options)
    head, memory = infini_attention(q[:, :cut], k[:, :cut], v[:, :cut], gate, **options)
    torch.testing.assert_close(head, whole[:, :cut], rtol=1e-11, atol=1e-11)
    if cut < tokens:
        rest, memory = infini_attention(q[:, cut:], k[:, cut:], v[:, cut:], gate, memory, **options)
        torch.testing.assert_close(rest, whole[:, cut:], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(memory, whole_memory, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [(13, 6), ((5, 2, 3), (0, 4, 1))])
def test_padding_has_no_effect_and_no_gradient(garbage: float, lengths: tuple[int, ...]) -> None:
    case = Case(13, rule="delta", lengths=lengths)
    options = case.options(torch.float32)
    clean = case.inputs(torch.float32)
    padding = torch.ones(2, 13, dtype=torch.bool)
    for row, counts in enumerate(valid_by_segment(torch.tensor(lengths), 2, 13, 5)):
        for segment, count in enumerate(counts):
            padding[row, 5 * segment : 5 * segment + count] = False
    dirty = {name: x.detach().clone() for name, x in clean.items()}
    for name in ("q", "k", "v"):
        dirty[name][padding] = garbage
    dirty = {name: x.requires_grad_() for name, x in dirty.items()}

    wanted, wanted_gradients = with_gradients(call(clean, **options), clean)
    values, gradients = with_gradients(call(dirty, **options), dirty)
    assert not values["out"][padding].any()
    for name, value in wanted.items():
        assert torch.equal(values[name], value), name
    for name, gradient in wanted_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    for name in ("q", "k", "v"):
        assert not gradients[name][padding].any()


def test_reset_clears_a_memory_with_nan() -> None:
    case = Case(7, reset=((1, 0), (1, 0)))
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    broken = {**inputs, "M": torch.full_like(inputs["M"], torch.nan), "z": torch.full_like(inputs["z"], torch.nan)}
    fresh = {name: x for name, x in inputs.items() if name not in ("M", "z")}
    for actual, wanted in zip(call(broken, **options), call(fresh, **{**options, "reset": None}), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_rotary_applies_only_to_local_attention() -> None:
    case = Case(13)
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    closed = {**inputs, "gate": torch.full_like(inputs["gate"], 50.0)}  # the output is only the memory read
    unrotated = {**options, "rotary": None}
    for actual, wanted in zip(call(closed, **options), call(closed, **unrotated), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    assert (call(inputs, **options)[0] - call(inputs, **unrotated)[0]).abs().max() > 1e-2


def test_closed_gate_gives_local_attention() -> None:
    case = Case(13, lengths=((5, 2, 3), (0, 4, 1)))
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    out = call({**inputs, "gate": torch.full_like(inputs["gate"], -50.0)}, **options)[0]
    local = local_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        segment_length=5,
        rotary=options["rotary"],
        lengths=options["lengths"],
    )
    torch.testing.assert_close(out, local, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", [True, False])
def test_first_segment_option_with_an_empty_memory(memory: bool) -> None:
    case = Case(5, memory=memory, reset=((1,), (1,)))
    inputs = case.inputs(torch.float64)
    options = case.options(torch.float64)
    local = local_attention(inputs["q"], inputs["k"], inputs["v"], segment_length=5, rotary=options["rotary"])
    paper = call(inputs, **options)[0]
    unscaled = call(inputs, **{**options, "first_segment": "local_only"})[0]
    torch.testing.assert_close(paper, local * (1 - inputs["gate"].sigmoid())[:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unscaled, local, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [5, 13])
def test_output_keeps_the_half_type_and_memory_is_float32(dtype: torch.dtype, tokens: int) -> None:
    case = Case(tokens, rule="delta")
    full = case.inputs(torch.float32)
    inputs = {
        name: x.detach().to(dtype if name in ("q", "k", "v") else torch.float32).requires_grad_() for name, x in full.items()
    }
    out, M, z = call(inputs, **case.options(torch.float32))
    assert (out.dtype, M.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
    wanted = call({name: x.detach().float() for name, x in inputs.items()}, **case.options(torch.float32))
    torch.testing.assert_close(out.float(), wanted[0], rtol=2e-2, atol=2e-2)
    # The memory is never in the half type, so it agrees to float32.
    torch.testing.assert_close((M, z), wanted[1:], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss_of(out, M, z), list(inputs.values()))
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        assert gradient.dtype == x.dtype and gradient.isfinite().all(), name


def test_autocast_does_not_affect_the_memory() -> None:
    case = Case(13, rule="delta")
    inputs, options = case.inputs(torch.float32), case.options(torch.float32)
    inputs["gate"] = torch.full((4,), 50.0, requires_grad=True)
    wanted = call(inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = call(inputs, **options)
    for actual, value in zip(results, wanted, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_of_300_segments_exceeds_half_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k = (torch.rand(1, 300 * 64, 1, 4, generator=generator) * 8).to(dtype)
    v = torch.rand(1, 300 * 64, 1, 4, generator=generator).to(dtype)
    out, memory = infini_attention(k, k, v, torch.zeros(1), segment_length=64)
    written = k.double()[0, :, 0] + 1  # σ of positive keys [T, D]
    assert written.sum(0).min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(memory.z[0, 0].double(), written.sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(memory.M[0, 0].double(), written.T @ v.double()[0, :, 0], rtol=1e-5, atol=0)
    assert out.isfinite().all()


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_checkpointed_windows_give_the_same_gradients(update_rule: str) -> None:
    case = Case(15, rule=update_rule)
    options = case.options(torch.float64)

    def window(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, M: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, memory = infini_attention(q, k, v, gate, MemoryState(M, z), **options)
        return out, memory.M, memory.z

    def chain(recompute: bool) -> Results:
        inputs = case.inputs(torch.float64)
        state, outs = (inputs["M"], inputs["z"]), []
        for first in (0, 5, 10):
            arguments = [inputs[name][:, first : first + 5] for name in ("q", "k", "v")] + [inputs["gate"], *state]
            result = checkpoint(window, *arguments, use_reentrant=False) if recompute else window(*arguments)
            outs.append(result[0])
            state = result[1:]
        return with_gradients((torch.cat(outs, dim=1), *state), inputs)

    torch.testing.assert_close(chain(True), chain(False), rtol=0, atol=0)


def test_memory_writes_need_two_segments_for_a_gradient() -> None:
    for tokens, trains in ((5, False), (10, True)):
        inputs = Case(tokens, memory=False, rotary=False).inputs(torch.float64)
        inputs["gate"] = torch.full((4,), 50.0, requires_grad=True)  # only the memory gives k and v a gradient
        out = call(inputs, segment_length=5)[0]
        (gradient,) = torch.autograd.grad(out.sum(), [inputs["v"]])
        assert (gradient.abs().max().item() > 1e-3) == trains


def test_gate_has_a_gradient_with_an_empty_memory() -> None:
    """A parameter without a gradient would hang data-parallel reduction."""
    for memory in (True, False):
        case = Case(5, memory=memory, reset=((1,), (1,)), first_segment="local_only")
        inputs = case.inputs(torch.float64)
        (gradient,) = torch.autograd.grad(call(inputs, **case.options(torch.float64))[0].sum(), [inputs["gate"]])
        assert not gradient.any()


def test_full_lengths_and_false_resets_change_nothing() -> None:
    case = Case(13)
    inputs, options = case.inputs(torch.float32), case.options(torch.float32)
    plain = call(inputs, **options)
    for lengths in (torch.tensor([13, 13]), torch.tensor([[5, 5, 3]] * 2, dtype=torch.int32)):
        idle = {**options, "lengths": lengths, "reset": torch.zeros(2, 3, dtype=torch.bool)}
        for actual, wanted in zip(call(inputs, **idle), plain, strict=True):
            assert torch.equal(actual, wanted)


def test_inputs_are_not_modified() -> None:
    case = Case(13, rule="delta", lengths=(13, 6), reset=((0, 1, 0), (1, 0, 1)))
    inputs = case.inputs(torch.float32)
    copies = {name: x.detach().clone() for name, x in inputs.items()}
    with_gradients(call(inputs, **case.options(torch.float32)), inputs)
    for name, x in inputs.items():
        assert torch.equal(x, copies[name]), name


def test_memory_state_zeros_and_detach() -> None:
    state = MemoryState.zeros(2, 3, 4, 5)
    assert (state.M.shape, state.z.shape) == ((2, 3, 4, 5), (2, 3, 4))
    assert state.M.dtype == state.z.dtype == torch.float32 and not state.M.any() and not state.z.any()
    inputs = Case(5).inputs(torch.float32)
    memory = infini_attention(*(inputs[name] for name in NAMES[:4]), segment_length=5)[1]
    assert memory.M.requires_grad and memory.z.requires_grad
    assert not memory.detach().M.requires_grad and not memory.detach().z.requires_grad


@pytest.mark.parametrize(("first", "second"), [(6, 6), (2, 6), (6, 2)])
def test_delta_rule_reads_negative_weights_after_a_short_segment(first: int, second: int) -> None:
    """With equal keys, old values are read with weight (n - m) / (n + m) after m tokens: negative for n < m."""
    width, old, new = 4, 3.0, 5.0
    values = torch.cat((torch.full((1, first, 1, width), old), torch.full((1, second, 1, width), new)), dim=1).double()
    keys = torch.randn(1, 1, 1, width, dtype=torch.float64).expand_as(values)
    gate, memory = torch.full((1,), 50.0, dtype=torch.float64), None  # the whole output is the memory read
    for part in (slice(0, first), slice(first, None)):
        q, k, v = (x[:, part] for x in (keys, keys, values))
        _, memory = infini_attention(q, k, v, gate, memory, segment_length=8, update_rule="delta")
    read, _ = infini_attention(keys[:, :1], keys[:, :1], values[:, :1], gate, memory, segment_length=8)
    wanted = old * (first - second) / (first + second) + new * second / (first + second)
    torch.testing.assert_close(read, torch.full_like(read, wanted), rtol=1e-5, atol=1e-5)
