"""Tokens per second of processor time and peak memory of training and evaluation, from streams of 32K to 1M tokens.

Both should stay constant."""

from __future__ import annotations

from typing import Any

from benchmarks.one_process import OneDocument, in_own_process, peak_megabytes, single_stream_run, timed
from infini_train.config import ModelConfig, TrainingConfig

SEGMENT, WINDOW = 512, 4
LENGTHS = (32 * 1024, 256 * 1024, 1024 * 1024)
ROUNDS = 2


def one(kind: str, tokens: int) -> dict[str, Any]:
    """Train on a stream of so many tokens, or evaluate it."""
    from infini_train import platform

    platform.install()
    from infini_train.model.micro_batch import Memory
    from infini_train.training.setup import build_parts
    from infini_train.training.signals import StopRequest
    from infini_train.training.step import train_step

    model = ModelConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        ffn_hidden_size=384,
        segment_length=SEGMENT,
    )
    steps = tokens // (SEGMENT * WINDOW)
    run = single_stream_run(model, TrainingConfig(steps=steps + 2, rows=1, micro_batches_per_window=WINDOW))
    parts = build_parts(run, OneDocument(run.data.vocab_size, (steps + 2) * SEGMENT * WINDOW))

    def train(count: int) -> None:
        for _ in range(count):
            train_step(parts, StopRequest())

    memory: Memory = {}

    def evaluate(count: int) -> None:
        nonlocal memory
        for _ in range(count * WINDOW):
            batch = parts.state.reader.next(1)
            assert batch is not None
            memory = parts.pipeline.evaluate([batch], memory, lambda batch, losses: None)

    work = train if kind == "train" else evaluate
    work(2)  # the first steps allocate
    seconds = timed(lambda: work(steps))
    return {"tokens_per_second": tokens / seconds, "peak_mb": peak_megabytes()}


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Rounds in turn, so that a busy moment of the machine does not fall on one length alone; the best of each is kept."""
    rows, conclusions = [], []
    for kind in ("train", "evaluate"):
        found: dict[int, list[dict[str, Any]]] = {length: [] for length in LENGTHS}
        for _ in range(ROUNDS):
            for length in LENGTHS:
                found[length].append(in_own_process("benchmarks.stream", kind=kind, tokens=length))
        best = {length: max(results, key=lambda r: r["tokens_per_second"]) for length, results in found.items()}
        first = best[LENGTHS[0]]
        for length in LENGTHS:
            rows.append(
                {
                    "kind": kind,
                    "tokens": length,
                    "tokens/s": best[length]["tokens_per_second"],
                    "of 32K": best[length]["tokens_per_second"] / first["tokens_per_second"],
                    "peak MB": best[length]["peak_mb"],
                    "peak of 32K": best[length]["peak_mb"] / first["peak_mb"],
                }
            )
        last = rows[-1]
        conclusions.append(
            f"{kind}: 1M runs at {last['of 32K']:.3f} of 32K's speed with {last['peak of 32K']:.3f} of its peak memory"
        )
    return rows, conclusions
