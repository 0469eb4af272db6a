"""The segment schedule: the order in which a device of the pipeline runs the micro-batches of a step.

It is a pure function, so it can be tested without processes.

Forwards run in stream order. Backwards run first-in-first-out across windows and last-in-first-out within a window: the memory
gradient of a window flows from its last micro-batch to its first, and windows are independent of each other. Four micro-batches
in windows of two, on two devices (F forward, B backward):

    device 0: F0 F1 F2 B1 F3 B0 B3 B2
    device 1: F0 F1 B1 F2 B0 F3 B3 B2

With v chunks of layers per device (`virtual_stages`), the model is divided into P v virtual stages: number c P + p is chunk c
on device p, and hidden states pass the ring of devices v times. Micro-batches then run in groups, as in Megatron-LM (arXiv
2104.04473, section 2.2): the forwards of a group run chunk by chunk, its backwards chunk by chunk from the last. Two rules
adapt the groups to windows without idle devices:

- A group holds at least P micro-batches. When a device reaches the group's next chunk, the group's first micro-batch has passed
  all other devices.
- Groups form blocks of whole windows. A window's first backward needs the last chunk's forward of its last micro-batch. No
  forward of a later block runs before that forward. The length of a block therefore bounds the warm-up and the number of live
  micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Operation:
    """One forward or backward of a device, on virtual stage chunk * P + p.

    A forward receives its input from the previous virtual stage and sends its output to the next. A backward receives the
    output's gradient from the next virtual stage and sends the input's gradient to the previous. Chunk c + 1 on device 0
    follows chunk c on the last device.
    """

    kind: Literal["forward", "backward"]
    micro_batch: int
    """0-based, in stream order."""
    chunk: int = 0
    """Index of the device's chunk of layers, 0-based."""


def pipeline_bubble(num_stages: int, num_micro_batches: int, *, virtual_stages: int = 1) -> float:
    """Return the fraction of a step in which a device is idle, if transfers take no time and all chunks take equal time.

    `segment_schedule` reaches this value; its docstring gives the time of a step.
    """
    fewer, more = sorted((num_stages, num_micro_batches))
    return 1.0 - virtual_stages * num_micro_batches / (virtual_stages * more + fewer - 1)


def backward_order(num_micro_batches: int, micro_batches_per_window: int) -> list[int]:
    """Return the micro-batches in the order of their backwards. The last window may be shorter than the others."""
    order: list[int] = []
    for start in range(0, num_micro_batches, micro_batches_per_window):
        end = min(start + micro_batches_per_window, num_micro_batches)
        order.extend(reversed(range(start, end)))
    return order


def segment_schedule(
    num_stages: int, stage: int, num_micro_batches: int, micro_batches_per_window: int, *, virtual_stages: int = 1
) -> list[Operation]:
    """Return the operations of one device for one optimizer step.

    After the warm-up, forwards and backwards alternate. Both ends of a link run its transfers in the same order. With chunks,
    there is also a link between the last device and the first. Hidden states and gradients use separate links.

    Time, if transfers take no time and a chunk's forward and backward take f and b: (f + b) (v N + P - 1) for every N >= P and
    every W, so the bubble is (P - 1) / (v N + P - 1). For N < P it is (f + b) (v P + N - 1). No order is faster.

    Live pairs of micro-batch and chunk (between forward and backward) on device p: at most
    min(v N, P - p + W - 1 + (v - 1) D), where D is the length of the longest block. Let S = W ceil(P / W) and R = N mod S:
    D <= S if R = 0 or R >= P, else D <= S + R < S + P. So D <= 2 P + W - 2 for every N. D = max(P, W) if one of P and W
    divides the other and their maximum divides N.

    Args:
        num_stages: P, number of devices in the pipeline.
        stage: p, index of the device, from 0.
        num_micro_batches: N, number of micro-batches of the step.
        micro_batches_per_window: W, number of micro-batches through which gradients flow back over the memory.
        virtual_stages: v, number of layer chunks per device.

    Raises:
        ValueError: a size is below 1, or the stage is not in the pipeline.
    """
    if min(num_stages, num_micro_batches, micro_batches_per_window, virtual_stages) < 1:
        raise ValueError(
            f"num_stages {num_stages}, num_micro_batches {num_micro_batches}, micro_batches_per_window "
            f"{micro_batches_per_window} and virtual_stages {virtual_stages} must be at least 1"
        )
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} is not in a pipeline of {num_stages}")
    blocks = _blocks(num_stages, num_micro_batches, micro_batches_per_window)
    groups = [group for block in blocks for group in _groups(block, num_stages, micro_batches_per_window)]
    order = backward_order(num_micro_batches, micro_batches_per_window)
    forwards = [Operation("forward", index, chunk) for group in groups for chunk in range(virtual_stages) for index in group]
    backwards = [
        Operation("backward", order[position], chunk)
        for group in groups
        for chunk in reversed(range(virtual_stages))
        for position in group
    ]
    # On the last device a window's first backward waits for its last forward. If the window starts s micro-batches into a block
    # that starts at a, that forward has index v a + (v - 1) D + s + W - 1 among the forwards, and the backward has index
    # v a + s among the backwards. An earlier device runs one more forward for each hop that the gradient takes to reach it.
    window = min(micro_batches_per_window, num_micro_batches)
    held_back = window - 1 + (virtual_stages - 1) * max(map(len, blocks))
    warmup = min(len(forwards), num_stages - stage - 1 + held_back)
    operations = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        operations += [forward, backward]
    return operations + backwards[len(forwards) - warmup :]


def _blocks(num_stages: int, num_micro_batches: int, micro_batches_per_window: int) -> list[range]:
    """Divide the step into as many blocks of whole windows as possible with at least P micro-batches each; one if N < P."""
    num_windows = -(-num_micro_batches // micro_batches_per_window)
    smallest = micro_batches_per_window * -(-num_stages // micro_batches_per_window)
    num_blocks = max(1, (num_micro_batches + smallest - num_stages) // smallest)
    # Only the last window can be short. The last block gets the most windows, so that it also has P micro-batches.
    starts = [block * num_windows // num_blocks * micro_batches_per_window for block in range(num_blocks)]
    return [range(start, end) for start, end in pairwise([*starts, num_micro_batches])]


def _groups(block: range, num_stages: int, micro_batches_per_window: int) -> list[range]:
    """Divide a block into groups of about equal size, with at least P micro-batches each.

    Smaller groups would stall. Larger groups would leave more hidden states in transit from the last device to the first.
    """
    num_groups = max(1, min(micro_batches_per_window, len(block)) // num_stages)
    return [block[group * len(block) // num_groups : (group + 1) * len(block) // num_groups] for group in range(num_groups)]
