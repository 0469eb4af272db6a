"""Benchmarks of `make bench-gpu`, as far as they can be tested without a GPU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, run, step
from benchmarks.run import NAMES, show
from infini_train.config.validation import validate


@pytest.mark.parametrize("model", step.MODELS)
@pytest.mark.parametrize("variant", step.VARIANTS)
def test_benchmark_configurations_are_valid(model: str, variant: str) -> None:
    config = step.step_run(model, variant, 3, fused_layers="fused")
    assert config.training.fused_layers == "fused" and config.training.deterministic
    validate(config, world_size=1)
    assert config.model.attention == variant.split()[0] and config.tokens_per_step == 2 * 4 * 4096
    assert config.model.hidden_size == {"1B": 2048, "slice of 8B": 4096}[model] and config.training.precision == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_benchmarks_report_a_missing_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert set(gpu.MEASURED) <= set(NAMES)
    for name in run.ON_CUDA:
        assert run.main([name]) == 2
        assert capsys.readouterr().err == f"python -m benchmarks.run {name} needs a CUDA device, but torch finds none\n"


def test_table_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    show("speeds", [{"tokens": 8, "ms": 1234.5}, {"tokens": 1024, "ms": None}])
    assert capsys.readouterr().out == "speeds\ntokens     ms\n     8  1,234\n  1024   None\n"


def test_measured_rows_are_kept_if_the_benchmark_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after_one_row() -> None:
        run.progress({"tokens": 8, "ms": 1.5})
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(step, "measure", stop_after_one_row)
    with pytest.raises(SystemExit):
        run.run("step")
    record = json.loads((tmp_path / "results" / "step.jsonl").read_text(encoding="utf-8"))
    assert record["rows"] == [{"tokens": 8, "ms": 1.5}] and record["conclusions"] == ["stopped after 1 rows"]
