"""The order in which a pipeline stage runs the micro-batches of a step: a pure function, checked without any process.

Forwards ascend. Backwards go first-in-first-out across windows and last-in-first-out inside one, because the gradient of a
window's memory flows from its last micro-batch to its first, while windows are independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Operation:
    """One step of a stage's work. A forward receives its input from the stage before and sends its output to the one after; a
    backward receives the output's gradient from the stage after and sends the input's gradient to the one before."""

    kind: Literal["forward", "backward"]
    micro_batch: int
    """0-based, in stream order."""


def backward_order(num_micro_batches: int, micro_batches_per_window: int) -> list[int]:
    """Micro-batches in the order of their backwards; the last window may be shorter than the others."""
    order: list[int] = []
    for start in range(0, num_micro_batches, micro_batches_per_window):
        end = min(start + micro_batches_per_window, num_micro_batches)
        order.extend(reversed(range(start, end)))
    return order


def num_warmup_micro_batches(num_stages: int, stage: int, num_micro_batches: int, micro_batches_per_window: int) -> int:
    """Forwards before a stage's first backward, less the one that goes with it: min(N, P - p - 1 + W - 1)."""
    window = min(micro_batches_per_window, num_micro_batches)
    return min(num_micro_batches, num_stages - stage - 1 + window - 1)


def segment_schedule(num_stages: int, stage: int, num_micro_batches: int, micro_batches_per_window: int) -> list[Operation]:
    """The operations of one stage for one optimizer step.

    After the warm-up, one forward and one backward alternate. At most P - p + W - 1 micro-batches are live on stage p,
    whatever N is; the bubble is (P - 1) / (N + P - 1).

    Args:
        num_stages: P, pipeline stages.
        stage: p, counted from 0.
        num_micro_batches: N, micro-batches of the step.
        micro_batches_per_window: W, micro-batches through which gradients flow back over the memory.

    Raises:
        ValueError: a size below 1 or a stage outside of the pipeline.
    """
    if min(num_stages, num_micro_batches, micro_batches_per_window) < 1:
        raise ValueError(
            f"num_stages {num_stages}, num_micro_batches {num_micro_batches} and micro_batches_per_window "
            f"{micro_batches_per_window} must be at least 1"
        )
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} is not in a pipeline of {num_stages}")
    warmup = num_warmup_micro_batches(num_stages, stage, num_micro_batches, micro_batches_per_window)
    forwards = iter(range(num_micro_batches))
    operations = [Operation("forward", next(forwards)) for _ in range(warmup)]
    for micro_batch in backward_order(num_micro_batches, micro_batches_per_window):
        upcoming = next(forwards, None)
        if upcoming is not None:
            operations.append(Operation("forward", upcoming))
        operations.append(Operation("backward", micro_batch))
    return operations
