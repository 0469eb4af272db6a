"""Compiled Triton kernels on CUDA: the checks of tests/kernels/test_triton.py, larger cases, and CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from tests.support import kernel_cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA device, and no interpreter"
)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in kernel_cases.on_cuda()])
def test_on_cuda(check: Callable[[], None]) -> None:
    check()
