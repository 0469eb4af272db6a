"""Sum a profiler's events to the time of each part of the training step.

A part is a named section of the step, marked by `infini_kernels.timing.timed`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infini_kernels.timing import PREFIX

PARTS = (
    "local attention",
    "memory path",
    "linear layers",
    "output layer and loss",
    "norms, activations, embedding",
    "communication",
    "optimizer",
    "data",
)
"""Parts in the order of the table. The rest of the step is waiting, and time in Python itself."""
OTHER = "norms, activations, embedding"
LINEAR = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "LinearWithGradAccumulation")
COMMUNICATION = ("c10d::", "nccl:", "gloo:", "ncclDevKernel", "record_param_comms")
STEP = "training step"
"""Name of the profiler range around a step. Events outside of all such ranges, as in an evaluation, are not counted."""
GRADIENT = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of one part per step: GPU time if there is a GPU, else CPU time."""

    name: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def time_by_part(events: Iterable[Any], steps: int, on_gpu: bool) -> list[PartTime]:
    """Return the time of each part of a step.

    An operation belongs to the innermost part around it, and its backward to the same part. Operations outside of all parts are
    assigned by name: matrix products to linear layers, collectives to communication, and the accumulation of finished gradients
    to the optimizer.

    Args:
        events: `FunctionEvent` objects of torch.profiler; only those inside of ranges named STEP count.
        steps: number of optimizer steps in the events.
        on_gpu: sum the time of GPU kernels instead of CPU time.
    """
    events = [event for event in events if event.device_type.name == "CPU" and not event.is_async]
    ranges = [event.time_range for event in events if event.name == STEP]
    roots = [
        event
        for event in events
        if (event.cpu_parent is None or event.cpu_parent.name == STEP)
        and event.name != STEP
        and any(each.start <= event.time_range.start < each.end for each in ranges)
    ]
    part_of_node: dict[tuple[int, int], str | None] = {}
    for event in roots:
        _map_nodes(event, None, part_of_node)
    microseconds: dict[tuple[str, bool], float] = defaultdict(float)
    for event in roots:
        _add(event, None, False, part_of_node, microseconds, on_gpu)
    names = [*PARTS, *sorted({name for name, _ in microseconds} - set(PARTS))]
    return [PartTime(name, *(microseconds[name, backward] / 1000 / steps for backward in (False, True))) for name in names]


def _is_backward(event: Any) -> bool:
    return event.fwd_thread > 0


def _map_nodes(event: Any, part: str | None, part_of_node: dict[tuple[int, int], str | None]) -> None:
    """Record the part of each node of the autograd graph.

    An operation without a node has the sequence number of the next one with a node, so the last entry wins.
    """
    if event.name.startswith(PREFIX):
        part = event.name.removeprefix(PREFIX)
    elif event.sequence_nr >= 0 and not _is_backward(event):
        part_of_node[event.thread, event.sequence_nr] = part
    for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
        _map_nodes(child, part, part_of_node)


def _add(
    event: Any,
    part: str | None,
    backward: bool,
    part_of_node: dict[tuple[int, int], str | None],
    microseconds: dict[tuple[str, bool], float],
    on_gpu: bool,
) -> None:
    if event.name.startswith(PREFIX):
        part = event.name.removeprefix(PREFIX)
    elif _is_backward(event):
        backward = True
        part = part_of_node.get((event.fwd_thread, event.sequence_nr), part)
    elif event.name.endswith(GRADIENT):
        part = "optimizer"
    named = _part_of_name(event.name)
    # A collective counts as communication inside any part, together with everything it calls.
    part = "communication" if named == "communication" else part or named
    if on_gpu:
        own = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
    else:
        own = event.self_cpu_time_total
    microseconds[part or OTHER, backward] += own
    for child in event.cpu_children:
        _add(child, part, backward, part_of_node, microseconds, on_gpu)


def _part_of_name(name: str) -> str | None:
    if name.startswith(COMMUNICATION):
        return "communication"
    return "linear layers" if name.startswith(LINEAR) else None
