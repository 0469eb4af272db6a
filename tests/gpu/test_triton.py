"""The Triton kernels compiled, on CUDA: the bodies of tests/unit/test_triton.py, and larger cases."""

from __future__ import annotations

import pytest
import torch

from tests import kernel_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
