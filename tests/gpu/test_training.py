"""A whole run on CUDA, command by command: the losses of a CPU run, and the same bits after a restart."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

from infini_train.config import RunConfig, save_config
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.command import call
from tests.support.distributed.processes import Ranks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA device, and no interpreter"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Prepare a corpus and return a run of a tiny delta model with learned writes."""
    folder = tmp_path_factory.mktemp("gpu")
    write_corpus(folder / "text")
    run = small_run(folder)
    run.model = replace(run.model, head_dim=16, update_rule="delta", write_strength="learned")
    run.layout.zero_stage = 1
    save_config(run, folder / "prepare.yaml")
    call("prepare", "--config", str(folder / "prepare.yaml"))
    return run


def trained(run: RunConfig, name: str, *arguments: str) -> list[dict]:
    """Train the run under a new name and return its records."""
    folder = Path(run.run_dir).parent
    run = replace(run, run_dir=str(folder / name))
    save_config(run, folder / f"{name}.yaml")
    call("pretrain", "--config", str(folder / f"{name}.yaml"), *arguments)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_losses_equal_those_of_a_cpu_run(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run, model=replace(run.model, short_convolution=3, short_convolution_reach="document"))
    run = replace(run, training=replace(run.training, recompute="layer", recompute_layers=2))  # of 4
    on_gpu = trained(run, "gpu", "--profile.steps", "2")
    assert "mfu" in on_gpu[-1]
    profiled = json.loads((Path(run.run_dir).parent / "gpu" / "profile" / "stage_0.json").read_text(encoding="utf-8"))
    assert profiled["device"] == torch.cuda.get_device_name()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = trained(run, "cpu")
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in on_gpu] == pytest.approx([record[key] for record in on_cpu], rel=2e-4)


@pytest.mark.parametrize("layers", ["plain", "fused"])
def test_bfloat16_restart_gives_the_same_bits(run: RunConfig, layers: str) -> None:
    training = replace(run.training, precision="bfloat16", fused_layers=layers, memory_ageing=20, recompute="layer")
    run = replace(run, training=training, checkpoint=replace(run.checkpoint, every=4))
    whole = trained(run, f"whole-{layers}")
    folder = Path(run.run_dir).parent / f"whole-{layers}"
    for checkpoint in (folder / "checkpoints").glob("step_00000008*"):
        checkpoint.rename(folder / "last")
    again = trained(run, f"whole-{layers}")
    assert [record["loss"] for record in again[-4:]] == [record["loss"] for record in whole[-4:]]
    assert [record["step"] for record in again[-4:]] == [5, 6, 7, 8]


def test_evaluates_and_generates(run: RunConfig) -> None:
    trained(run, "again")
    config = ["--config", str(Path(run.run_dir).parent / "again.yaml")]
    call("evaluate", *config)
    assert "continuation ---" in call("generate", *config, "--prompt", "once upon a time", "--max_new_tokens", "20")
    assert "report:" in call("report", *config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["1b.yaml", "8b.yaml", "8b-1m.yaml", "paper.yaml"])
def test_self_test_passes_for_shipped_configurations(name: str, precision: str) -> None:
    """The self-test runs before every run on several GPUs. Its tolerances were chosen on CPUs."""
    assert Ranks(1).run("tests.support.gpu_jobs", "found_by_self_test", name, precision) == [None]
