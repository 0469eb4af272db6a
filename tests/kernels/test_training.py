"""Whole training steps with the kernels, in every way to compute again, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infini_train.data.prepare import prepare
from tests.corpus import small_run, write_corpus
from tests.distributed.processes import Ranks

WAYS = [("none", 0), ("layer", 0), ("layer", 1), ("stage", 0)]


@pytest.mark.parametrize("options", [{}, {"update_rule": "delta", "write_strength": "learned"}], ids=["linear", "delta"])
def test_steps_are_the_same_whatever_is_computed_again(options: dict[str, Any], tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=20)
    run = small_run(tmp_path)
    run.model = replace(run.model, num_layers=2, head_dim=16, **options)
    run.training = replace(run.training, rows=2, micro_batches_per_window=2, windows_per_step=1)
    prepare(run)
    (found,) = Ranks(1).run("tests.kernels.training_jobs", "steps", run, WAYS, 2)
    plain = found.pop("plain")
    assert len(found) == len(WAYS)
    first = found.pop("none 0")
    for records in zip(first, plain, strict=True):
        assert records[0] == pytest.approx(records[1], rel=1e-4)
    for way, records in found.items():
        assert records == first, way
