"""Order in which a pipeline device runs the micro-batches of a step. A pure function, tested without processes.

Forwards ascend. Backwards go first-in-first-out across windows and last-in-first-out inside one, because the gradient of a
window's memory flows from its last micro-batch to its first, while windows are independent of each other. Four micro-batches
in windows of two, on two devices (F forward, B backward):

    device 0: F0 F1 F2 B1 F3 B0 B3 B2
    device 1: F0 F1 B1 F2 B0 F3 B3 B2

With v chunks of layers a device (`virtual_stages`), the model is cut into P v virtual stages: number c P + p is chunk c on
device p, and hidden states go round the devices v times. Micro-batches are then taken in groups, as in Megatron-LM (arXiv
2104.04473, section 2.2): a group's forwards pass chunk by chunk, its backwards chunk by chunk from the last. Two choices fit
the groups to windows and avoid stalls:

- A group holds at least P micro-batches. When a device comes to a group's next chunk, the group's first micro-batch has gone
  round the other devices.
- Groups form blocks of whole windows. A window's first backward needs the last chunk's forward of its last micro-batch. No
  forward of a later block comes before that one, so a block bounds the warm-up and the number of live micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class Operation:
    """One operation of a device, on virtual stage chunk * P + p.

    A forward receives its input from the virtual stage before and sends its output to the one after. A backward receives the
    output's gradient from the virtual stage after and sends the input's gradient to the one before. Chunk c + 1 on device 0
    follows chunk c on the last device.
    """

    kind: Literal["forward", "backward"]
    micro_batch: int
    """0-based, in stream order."""
    chunk: int = 0
    """Chunk of the device, 0-based."""


def pipeline_bubble(num_stages: int, num_micro_batches: int, *, virtual_stages: int = 1) -> float:
    """Return the share of a step in which a device waits, if transfers take no time and all chunks take the same time.

    `segment_schedule` reaches this value; its docstring gives the time.
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

    After the warm-up, one forward and one backward alternate. Both ends of a link meet its transfers in the same order; with
    chunks, the last device and the first have a link too. Hidden states and gradients have links of their own.

    Time, if transfers take none and a chunk's forward and backward take f and b: (f + b) (v N + P - 1) for every N >= P and
    every W, so the bubble is (P - 1) / (v N + P - 1). For N < P it is (f + b) (v P + N - 1). No order is faster.

    Live (between forward and backward) on device p: at most min(v N, P - p + W - 1 + (v - 1) D) pairs of micro-batch and chunk,
    where D is the longest block. Let S = W ceil(P / W) and R = N mod S: D <= S if R = 0 or R >= P, else D <= S + R < S + P.
    So D <= 2 P + W - 2, whatever N is; D = max(P, W) if one of P and W divides the other and their maximum divides N.

    Args:
        num_stages: P, devices of the pipeline.
        stage: p, the device, counted from 0.
        num_micro_batches: N, micro-batches of the step.
        micro_batches_per_window: W, micro-batches through which gradients flow back over the memory.
        virtual_stages: v, chunks of layers a device.

    Raises:
        ValueError: a size below 1 or a stage outside of the pipeline.
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
    # that starts at a, that forward stands at v a + (v - 1) D + s + W - 1 among the forwards and the backward at v a + s among
    # the backwards. A device before it runs one forward more for each hop that the gradient takes to come back.
    window = min(micro_batches_per_window, num_micro_batches)
    held_back = window - 1 + (virtual_stages - 1) * max(map(len, blocks))
    warmup = min(len(forwards), num_stages - stage - 1 + held_back)
    operations = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        operations += [forward, backward]
    return operations + backwards[len(forwards) - warmup :]


def _blocks(num_stages: int, num_micro_batches: int, micro_batches_per_window: int) -> list[range]:
    """Split the micro-batches into as many spans of whole windows as possible, each of at least P; one span if N < P."""
    num_windows = -(-num_micro_batches // micro_batches_per_window)
    smallest = micro_batches_per_window * -(-num_stages // micro_batches_per_window)
    num_blocks = max(1, (num_micro_batches + smallest - num_stages) // smallest)
    # Only the last window can be short. The last block gets the most windows, so that it has P micro-batches too.
    starts = [block * num_windows // num_blocks * micro_batches_per_window for block in range(num_blocks)]
    return [range(start, end) for start, end in pairwise([*starts, num_micro_batches])]


def _groups(block: range, num_stages: int, micro_batches_per_window: int) -> list[range]:
    """Split a block into about equal groups of at least P micro-batches.

    Smaller groups would stall. Larger groups leave more hidden states in transit from the last device to the first.
    """
    num_groups = max(1, min(micro_batches_per_window, len(block)) // num_stages)
    return [block[group * len(block) // num_groups : (group + 1) * len(block) // num_groups] for group in range(num_groups)]
