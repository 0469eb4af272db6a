"""Selection of the fused layers, SwiGLU under Triton's interpreter, and the loss without compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train.model import fused_layers as fused
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError
from tests.support import fused_cases
from tests.support.corpus import small_run


@pytest.mark.parametrize("dtype", fused_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("agrees", [fused_cases.swiglu_agrees, fused_cases.losses_agree])
def test_agrees_with_the_plain_layer(agrees: Callable[[torch.dtype, str], None], dtype: torch.dtype) -> None:
    with torch.compiler.set_stance("force_eager"):  # a compiler for the CPU may be missing
        agrees(dtype, "cpu")


def test_fused_layers_are_used_only_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path)
    asked = replace(run, training=replace(run.training, fused_layers="fused"))
    assert not fused.uses_fused_layers(asked)
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    assert fused.uses_fused_layers(asked) and not fused.uses_fused_layers(run)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert fused.uses_fused_layers(asked), "PyTorch has the norm"
    monkeypatch.setattr(fused, "NORM_IN_TORCH", False)
    assert not fused.uses_fused_layers(run)
    with pytest.raises(UserError, match=r"has no fused norm and the package liger-kernel is not installed"):
        fused.uses_fused_layers(asked)
