"""The Triton kernels under Triton's interpreter. tests/gpu runs the same checks with compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from infini_kernels import MemoryState, infini_attention
from infini_kernels.segments import SegmentLayout
from infini_kernels.triton import blocks, gradient_sum, operation
from infini_kernels.triton.blocks import by_token
from infini_kernels.triton.features import softmax_shift
from infini_kernels.triton.operator import Operator, as_custom_operators
from infini_kernels.triton.read import read_and_mix
from infini_kernels.triton.removal import segment_removals
from infini_kernels.triton.rotary import rotate, with_rotated
from infini_kernels.triton.states import segment_states
from infini_kernels.triton.walk import walk_segments
from tests.support import kernel_cases

TYPES = [torch.float32, torch.float16, torch.bfloat16]


CHECKPOINTED = ("odd widths, partial last segment", "learned writes", "corrected normaliser", "sharp features")
"""Cases that together use every operator."""
CASES = [(name, rule) for name, case in kernel_cases.SMALL.items() for rule in ("linear", "delta") if case.suits(rule)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("name", "update_rule"), CASES)
def test_agrees_with_float64(name: str, update_rule: str, dtype: torch.dtype) -> None:
    kernel_cases.agrees_with_float64(kernel_cases.SMALL[name], dtype, "cpu", update_rule, seed=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_program_with_several_blocks(update_rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the case with many segments; in the cases above every block has its own program."""
    monkeypatch.setattr(blocks, "WARPS_OF_A_FULL_CARD", 1)
    case = kernel_cases.SMALL["sharp features, learned writes, aged"]
    assert blocks.blocks_of_a_program(case.segment, 16, case.segments, 4) == 3
    kernel_cases.agrees_with_float64(case, dtype, "cpu", update_rule, seed=2)


def test_few_segments_still_fill_the_gpu() -> None:
    """Geometry of 8B: the measured choice from 32,768 tokens on, and fewer tokens per program below."""
    assert blocks.blocks_of_a_program(2048, 64, segments=512, warps=4) == 32
    assert blocks.blocks_of_a_program(2048, 64, segments=128, warps=4) == 16
    assert blocks.blocks_of_a_program(2048, 64, segments=32, warps=8) == 8
    assert blocks.blocks_of_a_program(2048, 64, segments=1, warps=4) == 1
    assert blocks.blocks_of_a_program(8192, 64, segments=512, warps=4) == 32, "no more tokens than were measured"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_segment_with_several_programs_and_blocks(update_rule: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use 64 tokens per block and two blocks per program, with a partial last block.

    Covers the choices for A100 (backward in two passes) and for H100.
    """
    monkeypatch.setattr(blocks, "TOKENS_OF_A_PROGRAM", 128)
    monkeypatch.setattr(blocks, "WARPS_OF_A_FULL_CARD", 1)
    monkeypatch.setattr(blocks, "compiled_for", [capability])
    case = kernel_cases.Case(1, 250, 2, 1, 16, 20, 250)
    kernel_cases.agrees_with_float64(case, torch.bfloat16, "cpu", update_rule, seed=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("keys", ["equal", "far below zero"])
def test_memory_of_difficult_inputs(keys: str, update_rule: str, dtype: torch.dtype) -> None:
    kernel_cases.holds_memory(keys, 40, 16, "cpu", update_rule, dtype)


def test_memory_of_many_segments() -> None:
    """On CUDA there are ten thousand segments, which would take minutes here."""
    kernel_cases.holds_memory("usual", 400, 2, "cpu", "linear", torch.bfloat16)


@pytest.mark.parametrize("dtype", kernel_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["odd widths, partial last segment", "shorter than a segment"])
def test_local_attention_alone_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    kernel_cases.local_agrees_with_float64(kernel_cases.SMALL[name], dtype, "cpu")


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_same_inputs_same_bits(update_rule: str) -> None:
    kernel_cases.same_bits(kernel_cases.SMALL["aged"], torch.bfloat16, "cpu", update_rule)


@pytest.mark.parametrize("name", kernel_cases.SMALL)
def test_same_bits_without_gradients(name: str) -> None:
    case = kernel_cases.SMALL[name]
    kernel_cases.same_bits_without_gradients(case, torch.float32, "cpu", "linear" if case.suits("linear") else "delta")


@pytest.mark.parametrize(("name", "update_rule"), [case for case in CASES if case[0] in CHECKPOINTED])
def test_same_bits_under_a_checkpoint(name: str, update_rule: str) -> None:
    kernel_cases.same_bits_under_a_checkpoint(kernel_cases.SMALL[name], torch.float32, "cpu", update_rule)


def test_operators_pass_opcheck() -> None:
    """torch checks the schema, fake implementation and autograd of every operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    tokens = torch.tensor([[5, 3], [5, 0]], dtype=torch.int32)
    k, v, q, local = normal(2, 9, 1, 16), normal(2, 9, 1, 20), normal(2, 9, 2, 16), normal(2, 9, 2, 20)
    M, z, gate = normal(2, 2, 1, 16, 20), normal(2, 2, 1, 16).detach().abs().requires_grad_(), normal(2)
    rows, few = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([5, 5], dtype=torch.int32)
    every, all_tokens = torch.arange(4, dtype=torch.int32), tokens.flatten()
    reset = torch.tensor([[0, 1], [0, 0]], dtype=torch.int8)
    angle = torch.randn(5, 8, generator=generator)
    shift, strength = operation.softmax_shift(k.detach()), normal(2, 9, 1).detach().abs().requires_grad_()
    all_z = z.detach().flatten(0, 1).requires_grad_()
    calls = [
        (operation.segment_states, (k, v, tokens, 5)),
        (operation.segment_states, (k, v, tokens, 5, shift, strength)),
        (operation.softmax_shift, (k.detach(),)),
        (operation.read_and_mix, (q, local, gate, M, z, tokens, 5, False, 1e-6)),
        (operation.read_and_mix, (q, local, gate, M, z, tokens, 5, False, 1e-6, operation.softmax_shift(q.detach()))),
        (
            operation.read_and_mix_in_place,
            (q.detach(), local.detach(), gate.detach(), M.detach(), z.detach(), tokens, 5, True, 1e-6),
        ),
        (operation.segment_removals, (k, z.detach().flatten(0, 1)[:2].requires_grad_(), rows, few, 5, 1e-6)),
        (operation.segment_removals, (k, z.detach().flatten(0, 1)[:2].requires_grad_(), rows, few, 5, 1e-6, shift, strength)),
        (
            operation.segment_removals,
            (k, all_z, every, all_tokens, 5, 1e-6, None, None, True),
        ),
        (operation.walk_segments, (normal(2, 1, 16, 20), M, reset, normal(2, 2, 1, 16, 16), False)),
        (operation.walk_sums, (normal(2, 1, 16, 20), normal(2, 1, 16), M, z, reset, False)),
        (operation.walk_sums, (M.detach()[:, 0], z.detach()[:, 0], M.detach(), z.detach(), None, True)),
        (operation.rotate, (q, k, None, None, angle.cos(), angle.sin(), tokens, 5, 1)),
        (operation.rotate, (q, k, local.detach()[..., :16], v.detach()[..., :16], angle.cos(), angle.sin(), tokens, 5, -1)),
        (operation.rotate, (q.detach(), k.detach(), None, normal(2, 9, 1, 16), angle.cos(), angle.sin(), tokens, 5, -1)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.custom if isinstance(operator, Operator) else operator, arguments)


def layer_with_everything() -> tuple[list[torch.Tensor], Callable[[], tuple[torch.Tensor, ...]]]:
    """Return leaves, and a function that calls every operator on them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 10, 2, 16), (2, 10, 1, 16), (2, 10, 1, 16), (2,), (1, 16)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    angle = torch.randn(5, 8, generator=generator)
    options = {"segment_length": 5, "rotary": (angle.cos(), angle.sin()), "feature_map": "softmax", "backend": "triton"}

    def call() -> tuple[torch.Tensor, ...]:
        q, k, v, gate, write_gate = leaves
        out, memory = infini_attention(q, k, v, gate, update_rule="delta", write_gate=write_gate, **options)  # type: ignore[arg-type]
        return out, memory.M, memory.z

    return leaves, call


def test_direct_calls_equal_custom_operators() -> None:
    leaves, call = layer_with_everything()

    def everything() -> tuple[torch.Tensor, ...]:
        results = call()
        return *results, *torch.autograd.grad(results, leaves, [torch.ones_like(each) for each in results])

    directly = everything()
    with as_custom_operators():
        torch.testing.assert_close(everything(), directly, rtol=0, atol=0)
    with torch.no_grad():
        without = call()
        with as_custom_operators():
            torch.testing.assert_close(call(), without, rtol=0, atol=0)


def test_operators_are_called_directly_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = layer_with_everything()
    asked: list[str] = []
    for operator in (segment_states, walk_segments, read_and_mix, segment_removals, rotate, softmax_shift):

        def custom(*arguments: object, name: str = operator.__name__, then: Callable[..., object] = operator.custom) -> object:
            asked.append(name)
            return then(*arguments)

        monkeypatch.setattr(operator, "custom", custom)
    call()
    assert not asked
    every = {"segment_states", "walk_segments", "read_and_mix", "segment_removals", "rotate", "softmax_shift"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, M, _ = call()
    assert out.shape == (2, 10, 2, 16) and M.shape == (2, 1, 16, 16)
    assert set(asked) == every
    asked.clear()
    with as_custom_operators():
        call()
    assert set(asked) == every


@pytest.mark.parametrize("way", [nullcontext, as_custom_operators])
def test_second_derivative_is_refused(way: Callable[[], AbstractContextManager[None]]) -> None:
    k, v = (torch.randn(1, 4, 1, 16).requires_grad_() for _ in range(2))
    tokens = torch.tensor([[4]], dtype=torch.int32)
    with way():
        written, _ = segment_states(k, v, tokens, 4)
        (first,) = torch.autograd.grad(written.sum(), k, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first.sum(), v)


@pytest.mark.parametrize("way", [nullcontext, as_custom_operators])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_second_derivative_of_the_recurrence_is_refused(
    update_rule: str, way: Callable[[], AbstractContextManager[None]]
) -> None:
    """Its backward is the same operator, and torch would use the forward's gradient for it."""
    q, k, v = (torch.randn(1, 12, 1, 16) for _ in range(3))
    M, z = torch.randn(1, 1, 16, 16, requires_grad=True), torch.rand(1, 1, 16)
    with way():
        _, memory = infini_attention(
            q, k, v, torch.zeros(1), MemoryState(M, z), segment_length=4, update_rule=update_rule, backend="triton"
        )
        (first,) = torch.autograd.grad(memory.M.square().sum(), M, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative; write backend='reference'"):
            torch.autograd.grad(first.sum(), M)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (2, 3), (0, 1), (1,)])
def test_gradients_of_rotated_and_original_tensors_are_summed(wanted: tuple[int, ...]) -> None:
    """Outputs 0 and 1 are queries and keys unchanged, and 2 and 3 are both rotated."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[5, 3], [5, 0]], dtype=torch.int32)
    angle = torch.randn(5, 8, generator=generator)
    tables = angle.cos(), angle.sin()
    shapes = (2, 9, 3, 16), (2, 9, 1, 16)
    leaves, same = (
        [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for shape in shapes] for _ in "ab"
    )
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in leaves)  # permuted strides
    found = with_rotated(q, k, *tables, tokens, 5)
    full = torch.where(torch.arange(9)[None, :, None, None] % 5 < tokens.repeat_interleave(5, 1)[:, :9, None, None], 1.0, 0.0)
    cos, sin = (x.repeat(2, 1)[:9, None] for x in tables)
    plain = []
    for x in same:
        a, b = (x * full).chunk(2, dim=-1)
        plain.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    torch.testing.assert_close(found, (*same, *plain))
    with torch.no_grad():
        torch.testing.assert_close(with_rotated(*same, *tables, tokens, 5), found, rtol=0, atol=0)
    outputs = [(found[i], (*same, *plain)[i]) for i in wanted]
    towards = [torch.randn(x.transpose(0, 2).shape, generator=generator).transpose(0, 2) for x, _ in outputs]
    chosen = [i for i in range(2) if {i, i + 2} & set(wanted)]
    ways = [
        torch.autograd.grad([pair[way] for pair in outputs], [each[i] for i in chosen], towards)
        for way, each in enumerate((leaves, same))
    ]
    torch.testing.assert_close(*ways)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradient_sum_is_bitwise_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, with a partial last one."""
    monkeypatch.setattr(gradient_sum, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(150, generator=generator)
    gradient = torch.randn(150, generator=generator).to(dtype)
    wanted = total + gradient.float()
    gradient_sum.add_contiguous(total[:149], gradient[:149])
    torch.testing.assert_close(total[:149], wanted[:149], rtol=0, atol=0)
    assert total[149] != wanted[149]


@pytest.mark.parametrize(
    ("name", "update_rule"),
    [
        ("odd widths, partial last segment", "linear"),
        ("odd widths, partial last segment", "delta"),
        ("sharp features", "linear"),
        ("corrected normaliser", "delta"),  # with learned writes
    ],
)
def test_torch_compile_makes_one_graph(name: str, update_rule: str) -> None:
    """There is no graph break, and forward and backward give the same numbers."""
    case = kernel_cases.SMALL[name]
    kernel_cases.compiles_whole(case, torch.float32, "cpu", update_rule, "aot_eager")


@pytest.mark.parametrize("backward", [False, True])
def test_sums_over_ten_thousand_equal_segments(backward: bool) -> None:
    """Rounding errors do not add up. Plain float32 sums are off by more than 1e-4 in some elements."""
    added = torch.full((1, 10_000, 1, 2), 2.6)
    added[..., 1] = 1 / 3
    start, reset = torch.zeros(1, 1, 2), torch.zeros(1, 10_000, dtype=torch.int8)
    entering, leaving = operation.walk_segments(start, added, reset, None, backward)
    wanted = added[0, 0, 0].double() * torch.arange(10_001, dtype=torch.float64)[:, None]
    found = torch.cat((entering[0, :, 0].flip(0) if backward else entering[0, :, 0], leaving[0]))
    assert ((found - wanted).abs() <= 1e-6 * wanted).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_read_keeps_small_values_under_cancellation(dtype: torch.dtype) -> None:
    """Two large numbers of the memory sum to 1, which is far below the bfloat16 precision of either."""
    M, z = torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16), 1 / 16)
    M[:, :, 0], M[:, :, 1] = 1000.3, -999.3
    tokens = [torch.zeros(1, 4, 1, 16, dtype=dtype) for _ in range(3)]  # σ(0) = 1
    memory = MemoryState(M, z)
    out, _ = infini_attention(*tokens, torch.full((1,), 20.0), memory, segment_length=4, backend="triton")
    torch.testing.assert_close(out.float(), torch.ones(1, 4, 1, 16), rtol=0.02, atol=0)


def test_full_segments_need_no_copy_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths on the host that turn out to be full are computed on the device, as without lengths."""

    def copy(x: Tensor, device: torch.device) -> Tensor:
        raise AssertionError("a copy")

    layout, q = SegmentLayout.of(13, 5), torch.zeros(2, 13, 1, 8, device="meta")
    full = torch.tensor([[5, 5, 3], [5, 5, 3]])
    with monkeypatch.context() as patched:
        patched.setattr(operation, "to_device", copy)
        for lengths in (None, full, torch.tensor([13, 13])):
            assert operation.tokens_by_segment(lengths, layout, q, 5).device == q.device
            assert operation.tokens_by_segment(lengths, layout, torch.zeros(2, 13, 1, 8), 5).tolist() == full.tolist()
    found = operation.tokens_by_segment(full - torch.tensor([[0, 0, 0], [0, 2, 3]]), layout, torch.zeros(2, 13, 1, 8), 5)
    assert found.tolist() == [[5, 5, 3], [5, 3, 0]]


def test_arguments_may_be_strided() -> None:
    kernel_cases.takes_any_strides("cpu")


@pytest.mark.parametrize("dtype", kernel_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [36, 1100])
def test_swiglu_agrees_with_float64(width: int, dtype: torch.dtype) -> None:
    kernel_cases.swiglu_agrees_with_float64(width, dtype, "cpu")


@pytest.mark.parametrize("dtype", kernel_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 20), (3, 3, 128), (2, 1, 16)])
def test_join_heads_equals_concatenation(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    kernel_cases.joins_heads(heads, groups, width, dtype, "cpu")


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_rows_inside_tokens(feature_map: str) -> None:
    kernel_cases.takes_tokens_before_rows(feature_map, "cpu")


def test_output_has_the_type_of_values_under_autocast() -> None:
    kernel_cases.keeps_its_type_under_autocast("cpu")


def test_distant_tokens_are_copied() -> None:
    far = torch.empty_strided((1, 16, 1, 16), (16 * 150_000_000, 150_000_000, 16, 1), device="meta")
    assert by_token(far, 14)[1] == (16 * 150_000_000, 150_000_000, 16)
    assert by_token(far, 16)[1] == (256, 16, 16)


def test_distant_heads_are_copied() -> None:
    """As in a transposed [B, H, T, D]: the product of head index and stride has 32 bits."""
    tokens = 2**20
    for heads, copied in ((16, False), (17, True)):
        far = torch.empty(1, heads, tokens, 128, device="meta").transpose(1, 2)
        assert (by_token(far)[1][2] == 128) == copied


def test_segment_too_large_for_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="a segment has 1048576 tokens of 32 heads of 128"):
        by_token(torch.empty(1, 2**20, 32, 128, device="meta"), 2**20)


class Recorded:
    """Replacement for a kernel that records the device of each launch."""

    def __init__(self) -> None:
        self.devices: list[object] = []
        self.current: list[object] = [0]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: self.devices.append(self.current[-1])


@pytest.mark.parametrize("index", [0, 1])
def test_kernels_run_on_the_device_of_the_tensors(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may not be that of the tensors."""
    kernel = Recorded()

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        kernel.current.append(chosen.index)
        yield
        kernel.current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    blocks.launch(kernel, (1,), SimpleNamespace(device=torch.device("cuda", index)))
    assert kernel.devices == [index] and kernel.current == [0]


def test_small_shared_memory_limits_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_has_little_shared_memory", lambda index: index == 1)
    for index, width, dtype, there in (
        (0, 128, torch.bfloat16, True),
        (1, 128, torch.bfloat16, False),
        (1, 64, torch.bfloat16, True),
        (1, 128, torch.float16, True),
    ):
        q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 1, width), device=torch.device("cuda", index))
        assert blocks.supports(q, q, q) == there  # type: ignore[arg-type]


@pytest.fixture
def launches() -> Iterator[list[tuple[str, tuple[int, ...], dict[str, object]]]]:
    """Return the kernel, grid and constants of each launch, without launching."""
    found: list[tuple[str, tuple[int, ...], dict[str, object]]] = []
    blocks.observers.append(lambda kernel, grid, _, __, constants: found.append((kernel.__name__, grid, constants)))
    yield found
    blocks.observers.pop()


def test_long_calls_stay_within_grid_limits(launches: list[tuple[str, tuple[int, ...], dict[str, object]]]) -> None:
    """The limit is 65,535 in all dimensions except the first."""
    T = 4_194_304
    q, k = (torch.empty(1, T, heads, 256, device="meta") for heads in (2, 1))
    angle = torch.empty(2048, 128, device="meta")
    rotate(q, k, None, None, angle, angle, torch.empty(1, T // 2048, dtype=torch.int32, device="meta"), 2048, 1)
    softmax_shift(q)
    assert len(launches) == 2
    for name, grid, _ in launches:
        assert max(grid[1:]) <= 65_535 < grid[0], name


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_calls_of_any_length_below_a_segment_share_kernels(
    update_rule: str, launches: list[tuple[str, tuple[int, ...], dict[str, object]]]
) -> None:
    """Kernels are compiled for powers of two, not for each length."""
    for tokens in range(33, 65):
        leaves = [torch.zeros(1, tokens, 1, 16, requires_grad=True) for _ in range(3)]
        out, memory = infini_attention(*leaves, torch.zeros(1), segment_length=100, update_rule=update_rule, backend="triton")  # type: ignore[misc]
        (out.sum() + memory.M.sum()).backward()
    kinds = {(name, str(sorted(constants.items()))) for name, _, constants in launches}
    assert len(kinds) == len({name for name, _ in kinds})


def test_unsupported_tensors_are_refused_or_use_the_reference() -> None:
    tensors = [torch.zeros(1, 4, 1, 8, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match=r"backend is 'triton', which takes CUDA .* q is \(1, 4, 1, 8\) torch.float64"):
        infini_attention(*tensors, torch.zeros(1, dtype=torch.float64), segment_length=2, backend="triton")
    assert infini_attention(*tensors, torch.zeros(1, dtype=torch.float64), segment_length=2)[0].dtype == torch.float64
