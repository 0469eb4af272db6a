"""The Triton kernels compiled, on CUDA: the bodies of tests/unit/test_triton.py, and larger cases."""

from __future__ import annotations

import os

import pytest
import torch

from infini_kernels import infini_attention
from tests import kernel_cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA device, and no interpreter"
)
CASES = {**kernel_cases.SMALL, **kernel_cases.LARGE}


@pytest.mark.parametrize("dtype", kernel_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, update_rule: str, dtype: torch.dtype) -> None:
    kernel_cases.agrees_with_float64(CASES[name], dtype, "cuda", update_rule, seed=1)


@pytest.mark.parametrize("dtype", kernel_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("keys", ["equal", "far below zero", "usual"])
def test_memory_of_ten_thousand_segments(keys: str, update_rule: str, dtype: torch.dtype) -> None:
    kernel_cases.holds_memory(keys, 10_000, 64, "cuda", update_rule, dtype)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("name", ["width 128, 8B", "many short segments, aged"])
def test_same_inputs_same_bits(name: str, update_rule: str) -> None:
    kernel_cases.same_bits(CASES[name], torch.bfloat16, "cuda", update_rule)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_torch_compile_takes_it_whole(update_rule: str) -> None:
    kernel_cases.compiles_whole(kernel_cases.LARGE["width 64"], torch.float32, "cuda", update_rule, "inductor")


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_cuda_graph_replays_forward_and_backward(update_rule: str) -> None:
    """A captured step gives the bits of an ordinary one, for inputs that came after the capture."""
    case = kernel_cases.Case(1, 1024, 4, 2, 64, 64, 256, memory=False, padding=False, reset=False)
    first, options = kernel_cases.draw(case, torch.bfloat16, "cuda", seed=1)
    second, _ = kernel_cases.draw(case, torch.bfloat16, "cuda", seed=2)
    inputs = [x.clone().requires_grad_() for x in first]

    def step(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
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
    wanted = step([x.clone().requires_grad_() for x in second])
    torch.testing.assert_close(results, wanted, rtol=0, atol=0)
