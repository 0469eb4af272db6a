"""Checks of the Triton kernels on any device: the same functions run under Triton's interpreter and on CUDA.

They need only torch and Triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_kernels import MemoryState, infini_attention, local_attention
from infini_kernels.gradient_sum import add_to_sum
from infini_kernels.segments import padding_mask

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
"""Tolerance of results in the type of the tokens, relative to the largest number of a result."""
MEMORY_TOLERANCE = 1e-4
"""Tolerance of M and z for any type of tokens, relative to their largest number."""


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    rows: int
    tokens: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    segment: int
    memory: bool = True
    rotary: bool = True
    padding: bool = True
    reset: bool = True
    repeats: bool = False
    first_segment: str = "paper"
    write_gate: bool = False
    normaliser: str = "paper"
    feature_map: str = "elu"

    @property
    def segments(self) -> int:
        return -(-self.tokens // self.segment)

    def suits(self, update_rule: str) -> bool:
        return update_rule == "delta" or self.normaliser == "paper"


SMALL = {
    "odd widths, partial last segment": Case(2, 13, 4, 2, 20, 36, 5),
    "one segment, nothing before it": Case(1, 21, 2, 2, 16, 16, 21, memory=False, reset=False),
    "shorter than a segment": Case(2, 7, 2, 1, 16, 20, 32, memory=False, padding=False),
    "one segment a call, some at a document's start": Case(5, 16, 4, 2, 16, 20, 16, padding=False),
    "one key head for three, one block too long": Case(1, 70, 3, 1, 32, 16, 35, rotary=False),
    "local_only": Case(2, 24, 2, 2, 16, 16, 8, memory=False, first_segment="local_only"),
    "aged": Case(2, 15, 4, 2, 16, 24, 5, repeats=True),
    "learned writes": Case(2, 15, 4, 2, 16, 20, 5, write_gate=True, repeats=True),
    "corrected normaliser": Case(2, 13, 2, 1, 16, 16, 5, write_gate=True, normaliser="corrected"),
    "sharp features": Case(2, 13, 4, 2, 20, 36, 5, feature_map="softmax"),
    "sharp features, learned writes, aged": Case(2, 70, 2, 1, 20, 16, 35, write_gate=True, feature_map="softmax", repeats=True),
    "nothing but tokens": Case(1, 64, 2, 2, 64, 64, 16, memory=False, rotary=False, padding=False, reset=False),
}
LARGE = {
    "width 64": Case(2, 1100, 8, 4, 64, 64, 512),
    "width 128, 8B": Case(1, 4100, 32, 8, 128, 128, 2048),
    "width 256": Case(1, 1500, 4, 2, 256, 256, 700),
    "many short segments, aged": Case(2, 1999, 4, 4, 128, 64, 64, repeats=True),
    "width 128, beyond the paper": Case(1, 1100, 4, 2, 128, 128, 512, write_gate=True, feature_map="softmax"),
    "width 256, beyond the paper": Case(1, 700, 2, 1, 256, 256, 300, write_gate=True, feature_map="softmax"),
    "corrected normaliser": Case(1, 1100, 4, 2, 128, 128, 512, normaliser="corrected"),
}
"""Cases for CUDA only."""


def draw(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the leaves (tokens, gate, memory and write gate) and the options of a call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, N, W = case.rows, case.tokens, case.segments, case.segment
    tokens = [normal(B, T, case.heads, case.key_width), normal(B, T, case.groups, case.key_width)]
    tokens.append(normal(B, T, case.groups, case.value_width))
    leaves = [x.to(device, dtype) for x in tokens] + [normal(case.heads).to(device)]
    if case.memory:
        M, z = normal(B, case.groups, case.key_width, case.value_width), 3 * normal(B, case.groups, case.key_width).abs()
        if case.normaliser == "corrected":
            M = torch.cat((M, 3 * normal(B, case.groups, case.key_width, 1).abs()), dim=-1)
        leaves += [M.to(device), z.to(device)]
    if case.write_gate:
        leaves.append(normal(case.groups, case.key_width).to(device))
    options: dict[str, Any] = {"segment_length": W, "first_segment": case.first_segment}
    options |= {"normaliser": case.normaliser, "feature_map": case.feature_map}
    if case.rotary:
        angle = torch.arange(W)[:, None] / 100 ** (torch.arange(case.key_width // 2) * 2 / case.key_width)
        options["rotary"] = angle.cos().to(device), angle.sin().to(device)
    if case.reset:
        options["reset"] = torch.rand(B, N, generator=generator) < 0.3
    if case.padding:
        present = torch.tensor([min(W, T - W * n) for n in range(N)])
        options["lengths"] = torch.minimum(present, torch.randint(0, W + 1, (B, N), generator=generator))
        for x in leaves[:3]:  # padding may contain anything
            x.masked_fill_(padding_mask(options["lengths"], T, W, x.device), float("nan"))
    if case.repeats:
        options["repeats"] = torch.randint(1, 40, (B, N), generator=generator)
    return leaves, options


def run(
    leaves: list[Tensor], options: dict[str, Any], seed: int, operation: Callable[..., Any] = infini_attention, **more: Any
) -> dict[str, Tensor]:
    """Return the outputs and every gradient, by name, for one random direction."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    memory, write_gate = _beside_tokens(leaves)
    out, leaving = operation(*leaves[:4], memory, write_gate=write_gate, **options, **more)
    generator = torch.Generator().manual_seed(seed)
    results = {"out": out, "M": leaving.M, "z": leaving.z}
    directions = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results.values()]
    total = sum((x * y).sum() for x, y in zip(results.values(), directions, strict=True))
    names = ["dq", "dk", "dv", "dgate", *(["dM", "dz"] if memory else []), *([] if write_gate is None else ["dwrite_gate"])]
    return {**results, **dict(zip(names, torch.autograd.grad(total, leaves), strict=True))}


def _beside_tokens(leaves: list[Tensor]) -> tuple[MemoryState | None, Tensor | None]:
    """Return the memory and the write gate in the leaves of `draw`; None for those that are missing."""
    write_gate = leaves[-1] if len(leaves) % 2 else None
    return MemoryState(*leaves[4:6]) if len(leaves) >= 6 else None, write_gate


def agrees_with_float64(case: Case, dtype: torch.dtype, device: str, update_rule: str, seed: int) -> None:
    """Compare outputs, memories and every gradient with the float64 reference on the CPU.

    Uninitialised outputs are poisoned with NaN.
    """
    leaves, options = draw(case, dtype, device, seed)
    with poisoned():
        found = run(leaves, options, seed, update_rule=update_rule, backend="triton")
    exact = {key: tuple(x.double().cpu() for x in value) if key == "rotary" else value for key, value in options.items()}
    wanted = run([x.double().cpu() for x in leaves], exact, seed, update_rule=update_rule, backend="reference")
    for name, x in found.items():
        error = (x.double().cpu() - wanted[name]).abs().max().item()
        tolerance = MEMORY_TOLERANCE if name in ("M", "z") else TOLERANCE[dtype]
        largest = wanted[name].abs().max().item()
        assert error <= tolerance * largest + 1e-9, f"{name}: {error:.2e} of {largest:.2e} ({case})"


def local_agrees_with_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    """Compare local attention, with rotation by the kernel, with plain PyTorch in float64."""
    leaves, options = draw(case, dtype, device, 8)
    exact = [x.double().cpu() for x in leaves[:3]]
    results = []
    for tensors, backend in ((leaves[:3], "triton"), (exact, "reference")):
        rotary = tuple(x.to(tensors[0].device, torch.float64 if backend == "reference" else x.dtype) for x in options["rotary"])
        inputs = [x.detach().clone().requires_grad_() for x in tensors]
        more = {"segment_length": case.segment, "rotary": rotary, "lengths": options.get("lengths"), "backend": backend}
        out = local_attention(*inputs, **more)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out)
        results.append([out, *torch.autograd.grad((out * direction).sum(), inputs)])
    for name, x, y in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error, largest = (x.double().cpu() - y).abs().max().item(), y.abs().max().item()
        assert error <= TOLERANCE[dtype] * largest, f"{name}: {error:.2e} of {largest:.2e} ({case})"


def holds_memory(keys: str, segments: int, width: int, device: str, update_rule: str, dtype: torch.dtype) -> None:
    """Compare M and z after many segments of difficult inputs with float64, within 1e-4."""
    T, D = segments * width, 16
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(1, T, 1, D, generator=generator)
    k = {"equal": k[:, :1].expand_as(k), "far below zero": k - 30, "usual": k}[keys]
    q, v = torch.randn(1, T, 1, D, generator=generator), 1 + torch.randn(1, T, 1, D, generator=generator)
    tokens = [x.to(dtype).contiguous() for x in (q, k, v)]
    gate = torch.zeros(1)
    options = {"segment_length": width, "update_rule": update_rule}
    with torch.no_grad():
        found = infini_attention(*(x.to(device) for x in (*tokens, gate)), **options, backend="triton")[1]
        wanted = infini_attention(*(x.double() for x in (*tokens, gate)), **options, backend="reference")[1]
    for x, y in zip(found, wanted, strict=True):
        error = (x.double().cpu() - y).abs().max().item()
        assert error <= MEMORY_TOLERANCE * y.abs().max().item(), f"{error:.2e} of {y.abs().max().item():.2e}"


def same_bits(case: Case, dtype: torch.dtype, device: str, update_rule: str) -> None:
    """Check that the same inputs give the same bits, in outputs and gradients.

    PyTorch runs in deterministic mode, because it computes local attention.
    """
    leaves, options = draw(case, dtype, device, 5)
    with deterministic_pytorch():
        first, *others = (run(leaves, options, 5, update_rule=update_rule, backend="triton") for _ in range(4))
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=0)


def same_bits_without_gradients(case: Case, dtype: torch.dtype, device: str, update_rule: str) -> None:
    """Compare the outputs with and without gradients.

    Without gradients the output overwrites that of local attention. Inputs must stay unchanged.
    """
    leaves, options = draw(case, dtype, device, 6)
    before = [x.clone() for x in leaves]
    memory, write_gate = _beside_tokens(leaves)
    options |= {"update_rule": update_rule, "write_gate": write_gate, "backend": "triton"}
    results = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            out, leaving = infini_attention(*leaves[:4], memory, **options)
        results.append([out.detach(), *leaving])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(leaves, before, rtol=0, atol=0, equal_nan=True)


def same_bits_under_a_checkpoint(case: Case, dtype: torch.dtype, device: str, update_rule: str) -> None:
    """Check that recomputation in the backward, as with `training.recompute: layer`, gives the same outputs and gradients."""
    leaves, options = draw(case, dtype, device, 9)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, memory: MemoryState | None, **more: Any) -> Any:
        write_gate = more.pop("write_gate")

        def inside(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            entering = None if memory is None else MemoryState(*others[:2])
            own = None if write_gate is None else others[-1]
            out, leaving = infini_attention(q, k, v, gate, entering, write_gate=own, **more)
            return out, *leaving

        others = [*(memory or ()), *([] if write_gate is None else [write_gate])]
        out, M, z = checkpoint(inside, q, k, v, gate, *others, use_reentrant=False)
        return out, MemoryState(M, z)

    with deterministic_pytorch():
        wanted = run(leaves, options, 9, update_rule=update_rule, backend="triton")
        found = run(leaves, options, 9, checkpointed, update_rule=update_rule, backend="triton")
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def takes_any_strides(device: str) -> None:
    """Check inputs that are not contiguous: a gate that is a column, and resets that are transposed."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 13, 2, 16, device=device) for _ in range(3))
    gate, reset = torch.randn(2, 2, device=device)[:, 0], (torch.rand(3, 3, device=device) < 0.4).t()
    assert not gate.is_contiguous() and not reset.is_contiguous() and reset.any()
    out, memory = infini_attention(q, k, v, gate, segment_length=5, reset=reset, backend="triton")
    wanted, left = infini_attention(q, k, v, gate, segment_length=5, reset=reset, backend="reference")
    torch.testing.assert_close([out, *memory], [wanted, *left], rtol=1e-4, atol=1e-4)


def takes_tokens_before_rows(feature_map: str, device: str) -> None:
    """Check tensors whose rows lie inside their tokens, as in a model's layers. The output has the same order."""
    torch.manual_seed(0)
    leaves = [torch.randn(13, 3, heads, 16, device=device) for heads in (4, 2, 2)]
    gate = torch.randn(4, device=device)
    options = {"segment_length": 5, "lengths": torch.tensor([13, 7, 0]), "feature_map": feature_map}
    found = []
    for backend in ("triton", "reference"):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out, memory = infini_attention(*(x.transpose(0, 1) for x in inputs), gate, backend=backend, **options)  # type: ignore[arg-type]
        if backend == "triton":
            assert out.transpose(0, 1).is_contiguous()
        towards = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device) for x in (out, *memory)]
        found.append([out, *memory, *torch.autograd.grad((out, *memory), inputs, towards)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def joins_heads(heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> None:
    """Compare `join_heads` with a concatenation for tensors with tokens first, rows first, and a strided last dimension."""
    from infini_kernels.triton.heads import join_heads

    T, B = 70, 3
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, heads, width), (T, B, groups, width), (T, B, width, groups)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    q, v = q.transpose(0, 1), v.transpose(2, 3)
    with poisoned():
        found = join_heads(q, k, v)
    wanted = torch.cat([q.unflatten(2, (groups, -1)), k.unsqueeze(3), v.unsqueeze(3)], dim=3).flatten(2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def swiglu_agrees_with_float64(width: int, dtype: torch.dtype, device: str) -> None:
    """Compare silu(gate) * up and its gradient with float64, for rows that end inside a block."""
    from infini_kernels.triton.swiglu import swiglu

    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, 3, 2 * width, generator=generator)).to(device, dtype).requires_grad_()
    towards = torch.randn(5, 3, width, generator=generator).to(device, dtype)
    with poisoned():
        out = swiglu(x)
        found = [out, *torch.autograd.grad(out, x, towards)]
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    for y, wanted in zip(found, [exact, *torch.autograd.grad(exact, wide, towards.double())], strict=True):
        error = (y.double() - wanted).abs().max().item()
        assert y.dtype == dtype and error <= TOLERANCE[dtype] * wanted.abs().max().item(), f"{error:.2e}"


def keeps_its_type_under_autocast(device: str) -> None:
    """Check that results have the type of the values even if autocast changes that of local attention."""
    q, k, v = (torch.randn(1, 8, 2, 16, device=device) for _ in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        out, memory = infini_attention(q, k, v, torch.zeros(2, device=device), segment_length=4, backend="triton")
    assert out.dtype == memory.M.dtype == torch.float32


def keeps_no_scores_of_grouped_heads() -> None:
    """Check that the GPU memory of float32 local attention is linear in the number of tokens.

    The scores of eight heads of 4,096 tokens would take 537 MB.
    """
    q, k, v = (torch.randn(1, 4096, heads, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    local_attention(q, k, v, segment_length=4096).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 200e6


def compiles_whole(case: Case, dtype: torch.dtype, device: str, update_rule: str, backend: str) -> None:
    """Check that torch.compile makes one graph of the operation, with the same results and gradients."""
    leaves, options = draw(case, dtype, device, 7)
    wanted = run(leaves, options, 7, update_rule=update_rule, backend="triton")
    torch.compiler.reset()  # otherwise the graphs of other cases count as recompilations of this one
    compiled = torch.compile(infini_attention, fullgraph=True, backend=backend)
    found = run(leaves, options, 7, operation=compiled, update_rule=update_rule, backend="triton")
    torch.testing.assert_close(found, wanted)


def replays_from_a_cuda_graph(update_rule: str) -> None:
    """Check that a captured forward and backward gives the same bits as an ordinary call, for inputs set after the capture."""
    case = Case(1, 1024, 4, 2, 64, 64, 256, memory=False, padding=False, reset=False)
    first, options = draw(case, torch.bfloat16, "cuda", seed=1)
    second, _ = draw(case, torch.bfloat16, "cuda", seed=2)
    inputs = [x.clone().requires_grad_() for x in first]

    def step(leaves: list[Tensor]) -> list[Tensor]:
        out, memory = infini_attention(*leaves, **options, update_rule=update_rule, backend="triton")
        return [out, memory.M, *torch.autograd.grad(out.float().sum() + memory.M.sum(), leaves)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs)
    with torch.no_grad():
        for x, y in zip(inputs, second, strict=True):
            x.copy_(y)
    graph.replay()
    torch.testing.assert_close(results, step([x.clone().requires_grad_() for x in second]), rtol=0, atol=0)


def sums_gradients_to_the_bit() -> None:
    """Check bit by bit the sum of a gradient and its float32 total on CUDA, also at unaligned addresses."""
    for count, first in ((2_000_003, 0), (2_000_003, 3), (5_003, 3)):
        total, gradient = torch.randn(count, device="cuda"), torch.randn(count, device="cuda").bfloat16()
        wanted = total[first:] + gradient[first:].float()
        add_to_sum(total[first:], gradient[first:])
        torch.testing.assert_close(total[first:], wanted, rtol=0, atol=0)


def on_cuda() -> list[tuple[str, Callable[[], None]]]:
    """Return every check of the compiled kernels, with its name."""
    checks: list[tuple[str, Callable[[], None]]] = []

    def add(check: Callable[..., None], name: str, *arguments: Any) -> None:
        checks.append((f"{check.__name__}: {name}", partial(check, *arguments)))

    for rule in ("linear", "delta"):
        for dtype in TOLERANCE:
            for name, case in {**SMALL, **LARGE}.items():
                if not case.suits(rule):
                    continue
                add(agrees_with_float64, f"{name}, {rule}, {dtype}", case, dtype, "cuda", rule, 1)
            for keys in ("equal", "far below zero", "usual"):
                add(holds_memory, f"10,000 segments, keys {keys}, {rule}, {dtype}", keys, 10_000, 64, "cuda", rule, dtype)
        for name in ("width 128, 8B", "many short segments, aged"):
            add(same_bits, f"{name}, {rule}", LARGE[name], torch.bfloat16, "cuda", rule)
        for name, case in SMALL.items():
            if case.suits(rule):
                add(same_bits_without_gradients, f"{name}, {rule}", case, torch.bfloat16, "cuda", rule)
                add(same_bits_under_a_checkpoint, f"{name}, {rule}", case, torch.bfloat16, "cuda", rule)
        add(compiles_whole, rule, LARGE["width 64"], torch.float32, "cuda", rule, "inductor")
        add(replays_from_a_cuda_graph, rule, rule)
    for dtype in TOLERANCE:
        for name in ("width 64", "width 128, 8B"):
            add(local_agrees_with_float64, f"{name}, {dtype}", LARGE[name], dtype, "cuda")
    add(takes_any_strides, "gate and resets", "cuda")
    for dtype in TOLERANCE:
        add(swiglu_agrees_with_float64, f"36, {dtype}", 36, dtype, "cuda")
        add(swiglu_agrees_with_float64, f"5632, {dtype}", 5632, dtype, "cuda")
        add(joins_heads, f"4 for 2 of 20, {dtype}", 4, 2, 20, dtype, "cuda")
        add(joins_heads, f"3 for 3 of 128, {dtype}", 3, 3, 128, dtype, "cuda")
    add(takes_tokens_before_rows, "elu", "elu", "cuda")
    add(takes_tokens_before_rows, "softmax", "softmax", "cuda")
    add(sums_gradients_to_the_bit, "bfloat16")
    add(keeps_its_type_under_autocast, "bfloat16", "cuda")
    add(keeps_no_scores_of_grouped_heads, "float32")
    return checks


@contextmanager
def deterministic_pytorch() -> Iterator[None]:
    """Return a context in which PyTorch uses only deterministic operations."""
    if torch.__version__ < "2.11":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def poisoned() -> Iterator[None]:
    """Return a context in which uninitialised tensors hold NaN, so that elements that no kernel writes are detected."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in POISONED]

    def poisons(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*arguments: Any, **options: Any) -> Tensor:
            made = original(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made

        return poison

    try:
        for owner, name, original in originals:
            setattr(owner, name, poisons(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


POISONED = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
