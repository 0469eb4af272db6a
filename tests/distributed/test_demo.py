"""configs/tiny.yaml for a fraction of its steps: it learns, and torchrun reproduces the run in other layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed.command import REPOSITORY, call

TOLERANCE = 1e-4
SHORT = 12


@dataclass
class Demo:
    """The demo's data folder, and the metrics of its own layout (two stages, through launch/local.py)."""

    folder: Path
    metrics: list[dict[str, Any]]
    """Metrics of a shorter run, with which other layouts are compared: eight processes are slow on a small machine."""


def train(folder: Path, run_dir: str, *overrides: str, steps: int, processes: int, torchrun: bool) -> list[dict[str, Any]]:
    config = ["--config", str(REPOSITORY / "configs" / "tiny.yaml"), "--data.path", str(folder / "data")]
    config += ["--run_dir", str(folder / run_dir), "--training.steps", str(steps), "--optimizer.warmup_steps", str(steps // 2)]
    config += ["--logging.wandb", "off", *overrides]
    call("pretrain", *config, processes=processes, torchrun=torchrun)
    return [json.loads(line) for line in (folder / run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    call("prepare", "--config", str(REPOSITORY / "configs" / "tiny.yaml"), "--data.path", str(folder / "data"))
    return Demo(folder, train(folder, "short", steps=SHORT, processes=2, torchrun=False))


def test_demo_learns(demo):
    """The loss falls by 1.5 nats, and the memory helps on held-out text."""
    metrics = train(demo.folder, "demo", steps=40, processes=2, torchrun=False)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.5
    assert metrics[-1]["held_out_loss"] < metrics[-1]["held_out_loss_memory_emptied"]


@pytest.mark.parametrize(
    "processes,overrides",
    [
        (4, {"layout.virtual_stages": 2, "layout.tensor_parallel_size": 2, "layout.sequence_parallel": "true"}),
        (
            8,
            {
                "layout.context_parallel_size": 2,
                "layout.pipeline_parallel_size": 4,
                "training.segments_per_micro_batch": 2,
                "training.micro_batches_per_window": 4,
                "training.recompute": "stage",
                "evaluation.micro_batches": 8,
            },
        ),
        (8, {"layout.pipeline_parallel_size": 1, "layout.tensor_parallel_size": 2, "layout.zero_stage": 3}),
    ],
    ids=["tp2-pp2-v2-sp", "cp2-pp4-stage", "tp2-dp4-zero3"],
)
def test_torchrun_reproduces_the_demo_in_other_layouts(processes, overrides, demo):
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    name = "-".join(str(value) for value in overrides.values())
    records = train(demo.folder, name, *arguments, steps=SHORT, processes=processes, torchrun=True)
    assert [record["step"] for record in records] == [record["step"] for record in demo.metrics]
    for record, expected in zip(records, demo.metrics, strict=True):
        assert record["tokens"] == expected["tokens"]
        for key in ("loss", "grad_norm", "held_out_loss", "held_out_loss_memory_emptied"):
            if key in expected:
                assert record[key] == pytest.approx(expected[key], rel=TOLERANCE), (record["step"], key)
