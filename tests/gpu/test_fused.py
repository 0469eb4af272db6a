"""Compiled fused layers on CUDA."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support import fused_cases

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA device, and no interpreter"
)


@pytest.mark.parametrize("dtype", fused_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("agrees", [fused_cases.norm_agrees, fused_cases.swiglu_agrees, fused_cases.losses_agree])
def test_agrees_with_the_plain_layer(agrees, dtype: torch.dtype) -> None:
    agrees(dtype, "cuda")
