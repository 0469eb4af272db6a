"""The choice of Liger's layers, and its loss under Triton's interpreter, which cannot run its norm and SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train import platform
from infini_train.errors import UserError
from infini_train.model import fused
from tests import liger_cases
from tests.corpus import small_run


@pytest.mark.parametrize("dtype", liger_cases.TOLERANCE, ids=str)
def test_loss_agrees_with_the_plain_one(dtype: torch.dtype) -> None:
    liger_cases.losses_agree(dtype, "cpu")


def test_liger_is_taken_on_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path)
    asked = replace(run, training=replace(run.training, fused_layers="liger"))
    assert not fused.takes_liger(asked)
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    assert fused.takes_liger(asked) and not fused.takes_liger(run)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not fused.takes_liger(run)
    with pytest.raises(UserError, match=r"training\.fused_layers is liger, but the package liger-kernel is not installed"):
        fused.takes_liger(asked)
