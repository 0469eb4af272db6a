"""A profiler's events as time by part of the training step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infini_kernels.parts import PREFIX

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
"""In the order in which they are shown; what was waited for, and Python's own time, is the rest of the step."""
OTHER = "norms, activations, embedding"
LINEAR = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "LinearWithGradAccumulation")
COMMUNICATION = ("c10d::", "nccl:", "gloo:", "ncclDevKernel", "record_param_comms")
STEP = "training step"
"""Name of the range around a step: what is outside of all such ranges, as an evaluation, is no part of one."""
GRADIENT = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of one part in one step, on the GPU where there is one."""

    name: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def time_by_part(events: Iterable[Any], steps: int, on_gpu: bool) -> list[PartTime]:
    """The parts of a step and their time.

    An operation belongs to the innermost `infini_kernels.parts.part` around it, and a backward to the part of its forward.
    Outside of all parts its name decides: products of matrices are linear layers, collectives communication, what happens to a
    finished gradient belongs to the optimizer.

    Args:
        events: of torch.profiler, `FunctionEvent`; those inside of ranges named STEP count.
        steps: optimizer steps that they cover.
        on_gpu: count kernels on the GPU, not time on the CPU.
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
        _note_forward(event, None, part_of_node)
    microseconds: dict[tuple[str, bool], float] = defaultdict(float)
    for event in roots:
        _add(event, None, False, part_of_node, microseconds, on_gpu)
    names = [*PARTS, *sorted({name for name, _ in microseconds} - set(PARTS))]
    return [PartTime(name, *(microseconds[name, backward] / 1000 / steps for backward in (False, True))) for name in names]


def _is_backward(event: Any) -> bool:
    return event.fwd_thread > 0


def _note_forward(event: Any, part: str | None, part_of_node: dict[tuple[int, int], str | None]) -> None:
    """The part of each node of the graph.

    An operation that makes no node has the number of the next that does, so the last counts.
    """
    if event.name.startswith(PREFIX):
        part = event.name.removeprefix(PREFIX)
    elif event.sequence_nr >= 0 and not _is_backward(event):
        part_of_node[event.thread, event.sequence_nr] = part
    for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
        _note_forward(child, part, part_of_node)


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
    # Collectives are counted as such wherever they are, and with all that they call.
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
