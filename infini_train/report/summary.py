"""Summary of a run in a few lines for the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from infini_train.report.run_results import LAST_STEPS, held_out, read_json, read_metrics, shown_perplexity


def summary_lines(run_dir: Path) -> list[str]:
    """Return lines with training loss, unigram entropy of the held-out text, and perplexity with memory kept and emptied.

    Raises:
        UserError: metrics.jsonl does not exist or cannot be read.
    """
    notes: list[str] = []
    records = read_metrics(run_dir / "metrics.jsonl")
    losses = records.finite("loss")
    lines = []
    if len(losses):
        last = float(np.mean(losses[-LAST_STEPS:]))
        lines.append(
            f"training loss: {losses[0]:.3f} nats per token in the first logged step, {last:.3f} in the last "
            f"{min(LAST_STEPS, len(losses))} ({abs(losses[0] - last):.3f} {'lower' if last <= losses[0] else 'higher'})"
        )
    result = held_out(records, read_json(run_dir / "evaluation.json", "evaluate", notes))
    if result.unigram_entropy is not None:
        lines.append(f"unigram entropy of the held-out text: {result.unigram_entropy:.3f} nats per token")
    if result.loss is not None:
        line = f"held-out perplexity ({result.source}): {shown_perplexity(result.loss, 2)}"
        if result.loss_memory_emptied is not None:
            emptied = shown_perplexity(result.loss_memory_emptied, 2)
            line += f" with memory, {emptied} with the memory emptied at every segment"
        lines.append(line)
    return lines
