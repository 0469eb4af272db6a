"""Tokens per second and peak memory of training and evaluation for streams of 32K to 1M tokens.

Both should be independent of the length. On a CPU, the speed is per second of processor time.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.one_process import OneDocument, import_trainer, in_own_process, peak_megabytes, single_stream_run, timed
from infini_train.config import ModelConfig, TrainingConfig

ON_CPU = ModelConfig(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    ffn_hidden_size=384,
    segment_length=512,
)
ON_GPU = ModelConfig(
    num_layers=2,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=14336,
    segment_length=2048,
)
"""Layers of 8B. With narrower layers, the host limits the speed, and host speed fluctuates."""
WINDOW = 4
SEGMENTS_ON_GPU = 4
"""Segments of a micro-batch. More than one, so that the host does not limit the speed."""
CHUNK = 32 * 1024
"""Number of tokens in one timing."""
LENGTHS = {CHUNK: 8, 8 * CHUNK: 2, 32 * CHUNK: 1}
"""Length in tokens -> number of rounds, so that each length has at least eight timings."""
STRETCHES = {"to 128K": slice(0, 4), "to 256K": slice(4, 8), "to 1M": slice(24, 32)}
"""Chunks of one training stream that are compared on a GPU. A GPU machine is otherwise idle, so one process is enough."""
prepare = import_trainer


def one(kind: str, tokens: int) -> dict[str, Any]:
    """Train on a stream or evaluate it, and measure each chunk.

    Args:
        kind: "train" or "evaluate".
        tokens: length of the stream.
    """
    from infini_train.runtime import platform

    platform.install()
    from infini_train.model.layer_context import Memory
    from infini_train.resilience.stop_request import StopRequest
    from infini_train.training.step import train_step
    from infini_train.training.training_run import build_training_run

    on_gpu = platform.has_cuda()
    model, precision, layers, zero = (ON_GPU, "bfloat16", "fused", 1) if on_gpu else (ON_CPU, "float32", "plain", 0)
    segments = SEGMENTS_ON_GPU if on_gpu else 1
    tokens_per_step = model.segment_length * segments * WINDOW
    steps = tokens // tokens_per_step
    training = TrainingConfig(steps=steps + 2, rows=1, segments_per_micro_batch=segments, micro_batches_per_window=WINDOW)
    training = replace(training, precision=precision, fused_layers=layers)  # type: ignore[arg-type]
    run = single_stream_run(model, training)
    run.layout.zero_stage = zero
    trained = build_training_run(run, OneDocument(run.data.vocab_size, (steps + 2) * tokens_per_step))

    def train(count: int) -> None:
        for _ in range(count):
            train_step(trained, StopRequest())

    memory: Memory = {}

    def evaluate(count: int) -> None:
        nonlocal memory
        for _ in range(count * WINDOW):
            batch = trained.state.reader.next(1)
            assert batch is not None
            memory = trained.pipeline.evaluate([batch], memory, lambda batch, losses: None)

    work = train if kind == "train" else evaluate
    work(2)  # the first steps allocate memory
    chunk_steps = CHUNK // tokens_per_step
    seconds, peaks = [], []
    for _ in range(steps // chunk_steps):
        seconds.append(timed(lambda: work(chunk_steps)))
        peaks.append(peak_megabytes())
    return {"seconds": seconds, "peak_mb": peaks[-1], "peaks_mb": peaks}


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return the speed from the lower quartile of the chunk times, and the largest peak of the rounds.

    Other work on the machine can only increase a time, hence the lower quartile.
    """
    if torch.cuda.is_available():
        return measure_on_gpu()
    rows, conclusions = [], []
    for kind in ("train", "evaluate"):
        found: dict[int, list[dict[str, Any]]] = {length: [] for length in LENGTHS}
        for number in range(max(LENGTHS.values())):
            for length, rounds in LENGTHS.items():
                if number < rounds:
                    found[length].append(in_own_process("benchmarks.stream", kind=kind, tokens=length))
        speed = {
            length: CHUNK
            / quantiles([second for result in results for second in result["seconds"]], n=4, method="inclusive")[0]
            for length, results in found.items()
        }
        peak = {length: max(result["peak_mb"] for result in results) for length, results in found.items()}
        for length in LENGTHS:
            rows.append(
                {
                    "kind": kind,
                    "tokens": length,
                    "tokens/s": speed[length],
                    "of 32K": speed[length] / speed[CHUNK],
                    "peak MB": peak[length],
                    "peak of 32K": peak[length] / peak[CHUNK],
                }
            )
        last = rows[-1]
        conclusions.append(
            f"{kind}: 1M runs at {last['of 32K']:.3f} of 32K's speed with {last['peak of 32K']:.3f} of its peak memory"
        )
    return rows, conclusions


def measure_on_gpu() -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row per stretch of a stream of a million tokens: speed from the median chunk time, and the peak so far."""
    result = in_own_process("benchmarks.stream", kind="train", tokens=max(LENGTHS))
    rows: list[dict[str, Any]] = []
    for name, chunks in STRETCHES.items():
        speed, peak = CHUNK / median(result["seconds"][chunks]), result["peaks_mb"][chunks.stop - 1]
        first = rows[0] if rows else {"tokens/s": speed, "peak MB": peak}
        ratios = {"of first": speed / first["tokens/s"], "peak of first": peak / first["peak MB"]}
        rows.append({"kind": "train", "stretch": name, "tokens/s": speed, "peak MB": peak, **ratios})
    last = rows[-1]
    return rows, [
        f"train: {last['of first']:.3f} of the first stretch's speed and {last['peak of first']:.3f} of its peak at 1M"
    ]
