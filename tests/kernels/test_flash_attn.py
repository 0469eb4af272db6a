"""Local attention with the flash-attn package.

Its Python code is used unchanged. Its CUDA kernels need a GPU, so its Triton kernels for AMD GPUs replace them, under the
interpreter. The tests use float16, because the interpreter multiplies bfloat16 as if it were integers.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infini_kernels import document_attention, documents, local_attention, softmax_attention
from tests.support.kernel_cases import SMALL, TOLERANCE, agrees_with_float64, local_agrees_with_float64

FOLDER = Path(sys.prefix) / "flash-attn"
CASES = {name: case for name, case in SMALL.items() if case.rotary}


@pytest.fixture(scope="module")
def flash_attn() -> Iterator[ModuleType]:
    if not (FOLDER / ".installed").exists():
        pytest.skip("the Python code of flash-attn is missing: run make .venv/flash-attn/.installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
        patch.syspath_prepend(FOLDER)
        module = importlib.import_module("flash_attn")
        for operation in ("forward", "backward", "varlen_forward", "varlen_backward"):
            # They are registered only for GPUs.
            operator = getattr(module.flash_attn_interface, f"_flash_attn_{operation}")
            operator.register_kernel("cpu")(operator._init_fn)
        yield module


@pytest.fixture
def calls(flash_attn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the code use flash-attn as on a GPU, and return the names of its functions that were called."""
    called: list[str] = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):

        def counted(
            *arguments: object, name: str = name, original: object = getattr(flash_attn, name), **options: object
        ) -> Tensor:
            called.append(name)
            return original(*arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(flash_attn, name, counted)
    for module in (softmax_attention, documents):
        monkeypatch.setattr(module, "flash_attention_for", lambda q, v: None if q.dtype == torch.float64 else flash_attn)
    return called


@pytest.mark.parametrize("name", CASES)
def test_segments_become_rows_of_one_call(name: str, calls: list[str]) -> None:
    local_agrees_with_float64(CASES[name], torch.float16, "cpu")
    assert calls == ["flash_attn_func"]


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("name", ["odd widths, partial last segment", "one key head for three, one block too long"])
def test_infini_attention_uses_its_output(name: str, update_rule: str, calls: list[str]) -> None:
    agrees_with_float64(SMALL[name], torch.float16, "cpu", update_rule, 1)
    assert calls == ["flash_attn_func"]


def test_rows_inside_tokens(calls: list[str]) -> None:
    """Rows lie inside tokens, as in a model's layers."""
    leaves = [torch.randn(13, 3, heads, 16, dtype=torch.float16) for heads in (4, 2, 2)]
    found = [
        local_attention(*(x.transpose(0, 1).to(kind) for x in leaves), segment_length=5) for kind in (torch.half, torch.double)
    ]
    assert calls == ["flash_attn_func"]
    torch.testing.assert_close(found[0].double(), found[1], rtol=0, atol=TOLERANCE[torch.float16])


@pytest.mark.parametrize("value_width", [16, 24])
def test_documents_of_all_rows_become_one_call(value_width: int, calls: list[str]) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = (2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, value_width)
    tokens = [torch.randn(shape, generator=generator).half() for shape in shapes]
    reset = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])
    options = {"segment_length": 8, "reset": reset, "lengths": torch.tensor([37, 40])}
    results = []
    for kind in (torch.float16, torch.float64):
        inputs = [x.to(kind, copy=True).requires_grad_() for x in tokens]
        out = document_attention(*inputs, **options)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        results.append([out, *torch.autograd.grad((out * towards).sum(), inputs)])
    assert calls == ["flash_attn_varlen_func"]
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == torch.float16
        assert (found.double() - wanted).abs().max() <= TOLERANCE[torch.float16] * wanted.abs().max()


def test_torch_compile_traces_it(flash_attn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile skips a newer version that cannot be imported."""
    monkeypatch.setattr(softmax_attention, "_candidates", lambda q, v: ["flash_attn_interface", "flash_attn"])
    monkeypatch.setattr(softmax_attention, "_FAILURES", {})
    leaves = [torch.randn(2, 13, heads, 16, dtype=torch.float16) for heads in (4, 2, 2)]
    wanted = softmax_attention.causal_attention(*leaves)
    torch.compiler.reset()
    found = torch.compile(softmax_attention.causal_attention, fullgraph=True, backend="eager")(*leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_version_3_has_the_same_signatures(flash_attn: ModuleType) -> None:
    """Compare signatures in the source of version 3, which comes with that of version 2.

    Version 3 cannot be imported without its kernels.
    """
    tree = ast.parse((FOLDER / "hopper" / "flash_attn_interface.py").read_text())
    functions = {node.name: [x.arg for x in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    packed = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for name, first in (("flash_attn_func", ["q", "k", "v"]), ("flash_attn_varlen_func", ["q", "k", "v", *packed])):
        assert functions[name][: len(first)] == first
        assert {"softmax_scale", "causal", "deterministic"} <= set(functions[name])
