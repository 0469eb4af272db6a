"""A whole training step on one GPU: 1B and a slice of 8B (its width, fewer layers), with infini, local and full attention."""

from __future__ import annotations

import operator
import statistics
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.one_process import OneDocument, import_trainer, in_own_process
from benchmarks.run import progress
from infini_train.config import LayoutConfig, RunConfig
from infini_train.overrides import with_overrides
from infini_train.parser import read_config

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {"slice of 8B": ("8b.yaml", 4), "1B": ("1b.yaml", 20)}
"""Configuration, and the layers that are kept."""
VARIANTS = ("infini linear", "local", "full")
ANY_ORDER = {"deterministic": False}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *((model, variant, {}) for model in MODELS for variant in VARIANTS),
    *(("slice of 8B", variant, ANY_ORDER) for variant in ("infini linear", "local")),
)
"""What is measured: with fused layers and equal bits, unless it says otherwise."""
SEGMENTS, MICRO_BATCHES, ROWS = 2, 4, 2
WARMUP, STEPS = 3, 6
prepare = import_trainer


def step_run(model: str, variant: str, **training: Any) -> RunConfig:
    """The run of one measurement: one process, one window a step.

    Args:
        training: values of the section of that name.
    """
    file, layers = MODELS[model]
    attention, _, rule = variant.partition(" ")
    kinds = {"model.attention": attention, "model.update_rule": rule or "linear"}
    kinds |= {f"training.{key}": value for key, value in training.items()}
    run = with_overrides(read_config(CONFIGS / file), kinds, "benchmarks.step")
    return replace(
        run,
        model=replace(run.model, num_layers=layers),
        data=replace(run.data, vocab_size=32000),
        layout=LayoutConfig(zero_stage=1),
        training=replace(
            run.training,
            steps=WARMUP + STEPS,
            rows=ROWS,
            segments_per_micro_batch=SEGMENTS,
            micro_batches_per_window=MICRO_BATCHES,
            recompute="none",
        ),
        optimizer=replace(run.optimizer, warmup_steps=1),
    )


def one(model: str, variant: str, **training: Any) -> dict[str, Any]:
    """Train a few steps on random tokens."""
    from infini_train import platform

    platform.install()
    from infini_train.parallel.layout import initialize_process_group
    from infini_train.training.setup import build_parts
    from infini_train.training.signals import StopRequest
    from infini_train.training.step import train_step

    run = step_run(model, variant, **training)
    initialize_process_group()
    parts = build_parts(run, OneDocument(run.data.vocab_size, (WARMUP + STEPS) * run.tokens_per_step // ROWS, documents=ROWS))
    records = [train_step(parts, StopRequest())[0] for _ in range(WARMUP + STEPS)][WARMUP:]
    return {
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in records),
        "mfu": statistics.median(record["mfu"] for record in records) if "mfu" in records[0] else None,
        "peak_gb": max(record["peak_memory"] for record in records) / 1e9,
    }


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each case."""
    fused = "fused" if find_spec("liger_kernel") else "plain"
    rows: list[dict[str, Any]] = []
    for number, (model, variant, changes) in enumerate(CASES, 1):
        training = {"fused_layers": fused, "deterministic": True, **changes}
        others = number < len(CASES)
        each = in_own_process("benchmarks.step", others=others, model=model, variant=variant, **training)
        rows.append(progress({"model": model, "attention": variant, **training, **each}))
    key = operator.itemgetter("model", "fused_layers", "deterministic")
    local = {key(row): row["tokens_per_second"] for row in rows if row["attention"] == "local"}
    for row in rows:
        row["of local"] = row["tokens_per_second"] / local[key(row)] if key(row) in local else None
    return rows, [
        f"{ROWS} rows, micro-batches of {SEGMENTS} segments of 2,048 tokens, {MICRO_BATCHES} a window and step, bfloat16"
    ]
