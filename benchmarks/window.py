"""Peak memory as a function of the window length, for each value of `training.recompute`."""

from __future__ import annotations

from typing import Any

from benchmarks.one_process import OneDocument, current_megabytes, in_own_process, peak_megabytes, single_stream_run, timed
from infini_train.config import ModelConfig, TrainingConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=128,
    ffn_hidden_size=768,
    segment_length=256,
)
WINDOWS = (2, 8, 32, 64)


def one(recompute: str, window: int) -> dict[str, Any]:
    """Train two steps of one window each."""
    from infini_train.runtime import platform

    platform.install()
    from infini_train.resilience.stop_request import StopRequest
    from infini_train.training.step import train_step
    from infini_train.training.training_run import build_training_run

    training = TrainingConfig(steps=4, rows=1, micro_batches_per_window=window, recompute=recompute)  # type: ignore[arg-type]
    run = single_stream_run(MODEL, training)
    trained = build_training_run(run, OneDocument(run.data.vocab_size, 4 * window * MODEL.segment_length))
    # Measured from here, so that the allocations of imports and setup do not count.
    before = current_megabytes()
    seconds = [timed(lambda: train_step(trained, StopRequest())) for _ in range(2)]
    return {"above_start_mb": peak_megabytes() - before, "tokens_per_second": window * MODEL.segment_length / min(seconds)}


def bytes_kept_by_stage_recompute() -> int:
    """Return the bytes per micro-batch in flight with recompute "stage": tokens, targets, loss mask and entering states."""
    state = MODEL.num_query_groups * MODEL.head_dim * (MODEL.head_dim + 1) * 4
    return MODEL.num_layers * state + MODEL.segment_length * (8 + 8 + 4)


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Measure each combination in its own process."""
    rows = []
    for window in WINDOWS:
        row: dict[str, Any] = {"segments": window}
        for recompute in ("none", "layer", "stage"):
            result = in_own_process("benchmarks.window", recompute=recompute, window=window)
            row[f"{recompute} MB"] = result["above_start_mb"]
            row[f"{recompute} tokens/s"] = result["tokens_per_second"]
        rows.append(row)
    first, last = rows[0], rows[-1]
    between = last["segments"] - first["segments"]
    conclusions = [
        f"{recompute}: {(last[f'{recompute} MB'] - first[f'{recompute} MB']) / between:.3f} MB per micro-batch in the window"
        for recompute in ("none", "layer", "stage")
    ]
    conclusions.append(f"a stage's input and memory state: {bytes_kept_by_stage_recompute() / 2**20:.3f} MB per micro-batch")
    return rows, conclusions
