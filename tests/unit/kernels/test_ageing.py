"""Memory ageing: one segment's update counted r times, compared with r separate writes."""

import pytest
import torch

from infini_kernels import MemoryState, infini_attention
from infini_kernels.ageing import PlainRemovals, repeated_removal
from infini_kernels.map_powers import Squares
from infini_kernels.map_series import Series
from infini_kernels.maps import RunsOfMaps

B, N, S, H, G, D, V = 2, 3, 4, 4, 2, 6, 5


def inputs(dtype=torch.float64, segments=N):
    generator = torch.Generator().manual_seed(segments)
    shapes = {"q": (B, segments * S, H, D), "k": (B, segments * S, G, D), "v": (B, segments * S, G, V), "gate": (H,)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def entering(dtype=torch.float64, value_width=V):
    generator = torch.Generator().manual_seed(7)
    M = torch.randn(B, G, D, value_width, generator=generator, dtype=dtype)
    z = torch.rand(B, G, D, generator=generator, dtype=dtype) * 20 + 5
    return MemoryState(M.requires_grad_(), z.requires_grad_())


def written_out(x, memory, repeats, rule, **options):
    """Compute segment by segment, writing each as often as `repeats` says. The output is that of the first write."""
    outs = []
    for segment in range(N):
        part = {name: value[:, segment * S : (segment + 1) * S] for name, value in x.items() if "gate" not in name}
        gates = {name: value for name, value in x.items() if "gate" in name}
        row_states = []
        for row in range(B):
            one = {name: value[row : row + 1] for name, value in part.items()}
            state = MemoryState(memory.M[row : row + 1], memory.z[row : row + 1])
            for time in range(int(repeats[row, segment])):
                out, state = infini_attention(**one, **gates, memory=state, segment_length=S, update_rule=rule, **options)
                if time == 0:
                    outs.append((segment, row, out))
            row_states.append(state)
        memory = MemoryState(*(torch.cat([getattr(state, name) for state in row_states]) for name in ("M", "z")))
    rows = [torch.cat([out for _, r, out in sorted(outs, key=lambda o: o[:2]) if r == row], dim=1) for row in range(B)]
    return torch.cat(rows), memory


@pytest.mark.parametrize(
    "rule,normaliser,feature_map",
    [("linear", "paper", "elu"), ("delta", "paper", "elu"), ("delta", "corrected", "elu"), ("delta", "corrected", "softmax")],
)
@pytest.mark.parametrize("learned_writes", [False, True])
def test_up_to_two_writes_are_exact(rule, normaliser, feature_map, learned_writes):
    repeats = torch.tensor([[1, 2, 1], [2, 1, 2]])
    results = []
    for aged in (True, False):
        x, memory = inputs(), entering(value_width=V + (normaliser == "corrected"))
        if learned_writes:
            generator = torch.Generator().manual_seed(1)
            x["write_gate"] = torch.randn(G, D, generator=generator, dtype=torch.float64).requires_grad_()
        options = {"normaliser": normaliser, "feature_map": feature_map}
        if aged:
            out, state = infini_attention(**x, memory=memory, segment_length=S, update_rule=rule, repeats=repeats, **options)
        else:
            out, state = written_out(x, memory, repeats, rule, **options)
        (out.square().sum() + state.M.square().sum() + state.z.square().sum()).backward()
        results.append([out, state.M, state.z, *(value.grad for value in x.values()), memory.M.grad, memory.z.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_linear_rule_is_exact_for_any_count():
    repeats = torch.tensor([[1, 7, 3], [40, 1, 5]])
    x, memory = inputs(), entering()
    out, state = infini_attention(**x, memory=memory, segment_length=S, repeats=repeats)
    expected, expected_state = written_out(x, memory, repeats, "linear")
    for found, wanted in ((out, expected), (state.M, expected_state.M), (state.z, expected_state.z)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", [3, 7, 20, 100])
def test_many_writes_by_the_delta_rule_are_approximate(times):
    """Runs of applications share a normaliser, so M is approximate and z is exact."""
    repeats = torch.full((B, N), times)
    x, memory = inputs(), entering()
    _, state = infini_attention(**x, memory=memory, segment_length=S, update_rule="delta", repeats=repeats)
    _, expected = written_out(x, memory, repeats, "delta")
    torch.testing.assert_close(state.z, expected.z, rtol=1e-10, atol=1e-10)
    error = (state.M - expected.M).norm() / expected.M.norm()
    assert error < 0.02, error


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_repeats_of_one_change_nothing(rule):
    x = inputs(torch.float32)
    out, state = infini_attention(**x, segment_length=S, update_rule=rule)
    aged, aged_state = infini_attention(**x, segment_length=S, update_rule=rule, repeats=torch.ones(B, N))
    for found, wanted in ((aged, out), (aged_state.M, state.M), (aged_state.z, state.z)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_four_thousand_writes_into_an_empty_memory_stay_finite(rule):
    x = inputs(torch.float32)
    reset = torch.tensor([[True, False, True], [True, False, False]])
    repeats = torch.tensor([[4000, 1, 4000], [1, 4000, 2]])
    out, state = infini_attention(**x, segment_length=S, update_rule=rule, reset=reset, repeats=repeats)
    (out.sum() + state.M.sum() / 4000).backward()
    assert all(torch.isfinite(value).all() for value in (out, state.M, state.z, *(y.grad for y in x.values())))


@pytest.mark.parametrize(
    "repeats,words",
    [
        (torch.ones(B, 2), "need \\[2, 3\\]"),
        (torch.zeros(B, N), "at least once"),
        (torch.full((B, N), 1.5), "holds 1.5, but .* a whole number of times"),
    ],
)
def test_wrong_repeats_are_refused(repeats, words):
    with pytest.raises(ValueError, match=words):
        infini_attention(**inputs(), segment_length=S, repeats=repeats)


def test_delta_rule_uses_runs_that_share_a_normaliser():
    """Compare segments that end at every position of the last run, in any order, with an explicit loop over the runs."""
    generator = torch.Generator().manual_seed(0)
    repeats = torch.tensor([[1, 2, 9, 3, 31], [16, 7, 1, 40, 15]])
    shape = (*repeats.shape, G, 4)
    keys = torch.rand(*shape, 3, dtype=torch.float64, generator=generator).requires_grad_()
    written = torch.randn(*shape, 6, dtype=torch.float64, generator=generator).requires_grad_()
    z = torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_()
    dz = keys.detach().sum(dim=-1).requires_grad_()

    class Updates:
        def __init__(self):
            self.written, self.z = written, dz

        def select(self, places):
            return PlainRemovals(keys.flatten(0, 1)[places])

    removed, added = repeated_removal(Updates(), z, repeats, 1e-6)

    identity, maps = torch.eye(4, dtype=torch.float64), []
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shape[:3])).tolist():
        k, r = keys[*place], int(repeats[*place[:2]])
        total, addition, done, run = identity, torch.zeros_like(written[*place]), 0, 1
        while done < r:
            count = min(run, r - done)
            scale = 1 / ((z[*place] + (done + (count - 1) / 2) * dz[*place]) @ k + 1e-6)
            kept = identity - (k * scale) @ k.T
            for _ in range(count):
                total, addition = kept @ total, kept @ addition + written[*place]
            done, run = done + count, 2 * run
        maps.append((identity - total, addition))
    wanted = [torch.stack(parts).view_as(x) for parts, x in zip(zip(*maps, strict=True), (removed, added), strict=True)]
    torch.testing.assert_close([removed, added], wanted, rtol=1e-10, atol=1e-12)
    directions = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in wanted]
    gradients = [
        torch.autograd.grad(sum((x * y).sum() for x, y in zip(maps, directions, strict=True)), (keys, written, z, dz))
        for maps in ((removed, added), wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def step_by_step(added, counts, *removed):
    """Compute `RunsOfMaps` step by step."""
    maps = []
    for segment in range(len(added)):
        factor, offset = torch.eye(D, dtype=added.dtype).expand(G, D, D), torch.zeros_like(added[0])
        for run, taken in zip(counts, removed, strict=True):
            for _ in range(run[segment] if segment < len(run) else 0):
                kept = torch.eye(D, dtype=added.dtype) - taken[segment]
                factor, offset = kept @ factor, kept @ offset + added[segment]
        maps.append((factor, offset))
    return [torch.stack(parts) for parts in zip(*maps, strict=True)]


def with_gradients(function, added, *removed):
    leaves = [x.clone().requires_grad_() for x in (added, *removed)]
    found = function(*leaves)
    value = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in found)
    results = [*found, *torch.autograd.grad(value, leaves)]
    for leaf, original in zip(leaves, (added, *removed), strict=True):
        assert torch.equal(leaf, original), "what came in stays as it was"
    return results


@pytest.mark.parametrize(
    "counts",
    [
        [[1, 1, 1, 1, 1], [13, 8, 6, 5, 1], [8, 8], [1]],  # binary digits in adjacent and in separate segments
        [[1, 1, 1], [2, 2], [4, 3]],
        [[1, 1], [1000, 1000]],
        [[1]],
    ],
)
def test_squares_and_their_gradients_equal_step_by_step(counts):
    generator = torch.Generator().manual_seed(len(counts))
    added = torch.randn(len(counts[0]), G, D, V, generator=generator, dtype=torch.float64)
    removed = [torch.randn(len(run), G, D, D, generator=generator, dtype=torch.float64) for run in counts]
    removed = [torch.eye(D, dtype=torch.float64) - 0.4 * x for x in removed]  # I - removed has powers that stay small
    kinds = [Squares] * (len(counts) - 1)
    found = with_gradients(lambda added, *removed: RunsOfMaps.apply(added, counts, kinds, *removed), added, *removed)
    wanted = with_gradients(lambda added, *removed: step_by_step(added, counts, *removed), added, *removed)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("largest", [0.0, 0.3, 1.0])
def test_series_and_its_gradients_equal_step_by_step(dtype, tolerance, largest):
    """Cover all eigenvalues that the series supports, and counts from one to thousands together."""
    generator = torch.Generator().manual_seed(3)
    counts = [[1, 1, 1, 1, 1], [4096, 4096, 100, 8, 1], [300, 2]]
    added = torch.randn(5, G, D, V, generator=generator, dtype=torch.float64)
    removed = []
    for run in counts:
        basis = torch.linalg.qr(torch.randn(len(run), G, D, D, generator=generator, dtype=torch.float64)).Q
        values = largest * torch.rand(len(run), G, 1, D, generator=generator, dtype=torch.float64)
        values[..., 0], values[..., 1] = 0, largest
        removed.append((basis * values) @ basis.mT / torch.tensor(run).view(-1, 1, 1, 1))
    wanted = with_gradients(lambda added, *removed: step_by_step(added, counts, *removed), added, *removed)
    found = with_gradients(
        lambda added, *removed: RunsOfMaps.apply(added, counts, [Series, Series], *removed),
        *(x.to(dtype) for x in (added, *removed)),
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
