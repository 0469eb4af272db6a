"""Says in words when a run does not learn to use its memory: a wrong or starved memory still lowers the loss."""

from __future__ import annotations

import math
from typing import Any

from infini_train.config import RunConfig

QUIET_SHARE = 0.5
"""Share of the steps before which nothing is said: reading and writing are learned after local attention."""
UNUSED_NATS = 1e-3
"""Memory goes unused if emptying it raises held-out loss by less."""
STUCK_GATE = 0.02
"""Gates are stuck if none has moved further from its start."""


def memory_warnings(run: RunConfig, record: dict[str, Any]) -> list[str]:
    """Warnings about a step's record; empty in the first half of the run and without memory.

    Args:
        record: of a step, with `gates`, and after an evaluation `held_out_loss` and `held_out_loss_memory_emptied`.
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
