"""Training step on one GPU: 1B and a slice of 8B (same width, fewer layers), with infini, local and full attention."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_process import OneDocument, import_trainer, in_own_process
from benchmarks.run import progress
from infini_train.cli.configuration import read_config
from infini_train.config import LayoutConfig, RunConfig
from infini_train.config.overrides import with_overrides

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {"slice of 8B": ("8b.yaml", 4), "1B": ("1b.yaml", 20)}
"""Name -> configuration file and number of layers."""
VARIANTS = ("infini linear", "local", "full")
CASES = tuple(itertools.product(MODELS, VARIANTS))
SEGMENTS, MICRO_BATCHES, ROWS = 4, 2, 2
"""Micro-batches of 16,384 tokens. With 8,192 tokens, the host limited the 1B model, and on slow hosts also the 8B slice."""
WARMUP, STEPS = 3, 6
"""The warm-up steps compile. STEPS steps are measured with deterministic algorithms, then as many without."""
prepare = import_trainer


def step_run(model: str, variant: str, steps: int, **training: Any) -> RunConfig:
    """Return the run of one measurement: one process, one window per step.

    Args:
        model: a key of MODELS.
        variant: attention, followed by the update rule for infini: "infini delta".
        steps: number of training steps.
        training: values that replace those of the training section.
    """
    file, layers = MODELS[model]
    attention, _, rule = variant.partition(" ")
    run = with_overrides(
        read_config(CONFIGS / file),
        {"model.attention": attention, "model.update_rule": rule or "linear"},
        "benchmarks.step",
    )
    usual: dict[str, Any] = {
        "segments_per_micro_batch": SEGMENTS,
        "micro_batches_per_window": MICRO_BATCHES,
        "recompute": "none",
    }
    return replace(
        run,
        model=replace(run.model, num_layers=layers),
        data=replace(run.data, vocab_size=32000),
        layout=LayoutConfig(zero_stage=1),
        training=replace(run.training, steps=steps, rows=ROWS, **usual | training),
        optimizer=replace(run.optimizer, warmup_steps=1),
    )


def trainer(model: str, variant: str, steps: int, **training: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that trains one step of `step_run` on random tokens and returns its metrics.

    It can be called `steps` times. The arguments are those of `step_run`.
    """
    from infini_train.runtime import platform

    platform.install()
    from infini_train.parallel.layout import initialize_process_group
    from infini_train.resilience.stop_request import StopRequest
    from infini_train.training.step import train_step
    from infini_train.training.training_run import build_training_run

    run = step_run(model, variant, steps, **training)
    initialize_process_group()
    trained = build_training_run(run, OneDocument(run.data.vocab_size, steps * run.tokens_per_step // ROWS, documents=ROWS))
    return lambda: train_step(trained, StopRequest())[0]


def one(model: str, variant: str, fused_layers: str) -> dict[str, Any]:
    """Measure steps with deterministic algorithms (the default), then steps without."""
    from infini_train.runtime import platform

    train = trainer(model, variant, WARMUP + 1 + 2 * STEPS, fused_layers=fused_layers)
    deterministic = [train() for _ in range(WARMUP + STEPS)][WARMUP:]
    platform.set_deterministic(False)
    any_order = [train() for _ in range(1 + STEPS)][1:]
    known = [key for key in ("tokens_per_second", "mfu") if key in deterministic[0]]  # no MFU on an unknown device
    return {
        **{key: statistics.median(record[key] for record in deterministic) for key in known},
        "any order": statistics.median(record["tokens_per_second"] for record in any_order),
        "peak_gb": max(record["peak_memory"] for record in deterministic) / 1e9,
    }


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each model and attention."""
    fused = "fused" if hasattr(torch, "_fused_rms_norm") or find_spec("liger_kernel") else "plain"
    rows: list[dict[str, Any]] = []
    for number, (model, variant) in enumerate(CASES, 1):
        others = number < len(CASES)
        each = in_own_process("benchmarks.step", others=others, model=model, variant=variant, fused_layers=fused)
        rows.append(progress({"model": model, "attention": variant, "layers": fused, **each}))
    for row in rows:
        local = next(each for each in rows if each["model"] == row["model"] and each["attention"] == "local")
        row["of local"] = row["tokens_per_second"] / local["tokens_per_second"]
    return rows, [
        f"{ROWS} rows, micro-batches of {SEGMENTS} segments of 2,048 tokens, {MICRO_BATCHES} a window and step, bfloat16; "
        "deterministic; column 'any order' is tokens/s without deterministic algorithms"
    ]
