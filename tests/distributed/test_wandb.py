"""Training continues if Weights & Biases cannot be reached or its process dies; tested in subprocesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.config import LoggingConfig, RunConfig
from infini_train.training.metrics import _for_wandb, _wandb_mode

RUN = """
import os, signal, sys
from infini_train.config import RunConfig
from infini_train.training.metrics import FINISH_SECONDS, MetricsWriter

run = RunConfig(run_dir=sys.argv[1])
run.logging.wandb = sys.argv[2]
with MetricsWriter(run, 0, enabled=True) as metrics:
    metrics.write({"step": 1, "gates": [[0.5, 0.25]]})
    assert metrics._wandb.settings.finish_timeout == FINISH_SECONDS
    if sys.argv[3:] == ["kill"]:
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        assert children, "Weights & Biases has no process"
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)
        metrics.write({"step": 2})
        metrics.write({"step": 3})
"""


def train(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a process that writes records, check its exit code, and return its output."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    "environment,mode",
    [
        ({}, "off"),
        ({"WANDB_API_KEY": "0"}, "online"),
        ({"WANDB_API_KEY": "0", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "0", "WANDB_MODE": "disabled"}, "off"),
        ({"WANDB_MODE": "online"}, "online"),  # a user who has logged in
    ],
)
def test_auto_follows_the_environment(environment, mode, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _wandb_mode(RunConfig()) == mode
    assert _wandb_mode(RunConfig(logging=LoggingConfig(wandb="offline"))) == "offline"


def test_gates_that_are_not_finite_are_left_out():
    flat = _for_wandb({"step": 1, "gates": [[0.5, float("nan")], [float("inf")]]})
    assert [sum(flat[f"gates/layer_{layer}"].histogram) for layer in (1, 2)] == [1, 0]


def test_training_continues_without_network(tmp_path):
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    printed = train(tmp_path, "online", **unreachable)
    assert "Weights & Biases cannot be reached" in printed and "wandb sync" in printed and "Traceback" not in printed
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_training_continues_after_its_process_dies(tmp_path):
    printed = train(tmp_path, "offline", "kill")
    assert printed.count("Weights & Biases is lost") == 1 and "Traceback" not in printed
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
