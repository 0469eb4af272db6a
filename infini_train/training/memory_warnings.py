"""Warn when a run does not learn to use its memory. The loss alone does not show this, because it falls in any case."""

from __future__ import annotations

import math
from typing import Any

from infini_train.config import RunConfig

QUIET_SHARE = 0.5
"""Share of the steps without warnings: the model learns to read and write memory only after local attention."""
UNUSED_NATS = 1e-3
"""Memory counts as unused if emptying it raises held-out loss by less than this, in nats per token."""
STUCK_GATE = 0.02
"""Gates count as stuck if none has moved further than this from its initial value."""


def memory_warnings(run: RunConfig, record: dict[str, Any]) -> list[str]:
    """Return the warnings about a step's metrics; empty in the first half of the run and for models without memory.

    Args:
        record: the step's metrics with `gates`; after an evaluation also `held_out_loss` and `held_out_loss_memory_emptied`.
    """
    if run.model.attention != "infini" or record["step"] < QUIET_SHARE * run.training.steps:
        return []
    found = []
    start = 1 / (1 + math.exp(-run.model.initial_gate))
    moved = max(abs(gate - start) for layer in record["gates"] for gate in layer)
    if moved < STUCK_GATE:
        found.append(
            f"gates are stuck: after {record['step']:,} steps all heads are within {STUCK_GATE} of {start:.2f}, where they "
            f"began; optimizer.gate_learning_rate is {run.optimizer.gate_learning_rate:g} (1e-2 is known to move them)"
        )
    kept, emptied = record.get("held_out_loss"), record.get("held_out_loss_memory_emptied")
    if kept is not None and emptied is not None and emptied - kept < UNUSED_NATS:
        segments = run.training.segments_per_micro_batch * run.training.micro_batches_per_window
        found.append(
            f"memory goes unused: emptying it changes held-out loss by {emptied - kept:+.4f} nats; gradients reach the writing "
            f"of memory through {segments} segments a window (8 to 16 are known to work), and documents must be longer than one"
        )
    return found
