"""The segment schedule: order, dependencies, links between devices, live micro-batches, and bubble."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest

from infini_train.parallel.schedule import Operation, backward_order, pipeline_bubble, segment_schedule

SIZES = [(1, 1, 1), (1, 8, 4), (2, 8, 8), (2, 5, 2), (3, 7, 3), (4, 16, 4), (4, 3, 8), (8, 64, 16), (16, 40, 1)]
"""(P devices, N micro-batches, W micro-batches per window)"""

CHUNKED_SIZES = [
    *SIZES,
    (4, 16, 1),  # blocks of P windows
    (4, 16, 16),  # a window as long as the stream
    (4, 24, 6),  # P does not divide W
    (4, 24, 3),  # W does not divide P
    (4, 22, 6),  # the last window forms its own block
    (4, 21, 6),  # the last window is shorter than P and joins a block
    (4, 23, 3),  # several windows join blocks
    (2, 7, 5),
    (5, 4, 2),  # fewer micro-batches than devices
    (6, 3, 1),
]


@dataclass
class Run:
    time: int
    most_live: list[int]
    """By device: the maximum number of pairs of micro-batch and chunk between their forward and their backward."""


def simulate(
    devices: int, micro_batches: int, window: int, chunks: int = 1, forward_time: int = 1, backward_time: int = 1
) -> Run:
    """Simulate all devices, each running its operations strictly in order.

    Sends are buffered and receives block. Between two devices there is one queue for hidden states and one for gradients. The
    next message in the queue must be the input of the operation.

    The simulation fails on a deadlock, on a queue whose two ends use different orders, on a backward before its forward, on a
    forward before its memory and on a backward before its memory gradient.
    """
    lists = [segment_schedule(devices, device, micro_batches, window, virtual_stages=chunks) for device in range(devices)]
    last = devices * chunks - 1
    queues: dict[tuple[str, int], deque[tuple[int, int, int]]] = {
        (kind, sender): deque() for kind in ("forward", "backward") for sender in range(devices)
    }
    forward_done = [bytearray(micro_batches) for _ in range(last + 1)]
    backward_done = [bytearray(micro_batches) for _ in range(last + 1)]
    position, clock, live, most_live = [0] * devices, [0] * devices, [0] * devices, [0] * devices
    runnable = deque(range(devices))
    while runnable:
        device = runnable.popleft()
        while position[device] < len(lists[device]):
            operation = lists[device][position[device]]
            index, virtual = operation.micro_batch, operation.chunk * devices + device
            forward = operation.kind == "forward"
            step = 1 if forward else -1
            if virtual != (0 if forward else last):
                queue = queues[operation.kind, (device - step) % devices]
                if not queue:
                    break
                *message, arrival = queue.popleft()
                assert message == [virtual, index], "the two ends of a link use different orders"
                clock[device] = max(clock[device], arrival)
            if forward:
                assert index == 0 or forward_done[virtual][index - 1], "a forward before its memory"
                forward_done[virtual][index] += 1
            else:
                assert forward_done[virtual][index], "a backward before its forward"
                following = index + 1
                if following % window and following < micro_batches:
                    assert backward_done[virtual][following], "a backward before its memory gradient"
                backward_done[virtual][index] += 1
            clock[device] += forward_time if forward else backward_time
            live[device] += step
            most_live[device] = max(most_live[device], live[device])
            position[device] += 1
            if virtual != (last if forward else 0):
                queues[operation.kind, device].append((virtual + step, index, clock[device]))
                runnable.append((device + step) % devices)
    assert position == [len(operations) for operations in lists], "deadlock"
    assert not any(queues.values()), "a message was never received"
    assert all(set(done) == {1} for done in forward_done + backward_done), "a micro-batch did not run exactly once"
    return Run(max(clock), most_live)


def ideal_time(devices: int, micro_batches: int, chunks: int = 1) -> int:
    """Return a lower bound of the time in chunk operations, if forward and backward take equal time.

    It is the larger of two bounds: the work of the last device, or of the last virtual stage, plus the path to it and back.
    """
    return 2 * max(chunks * micro_batches + devices - 1, chunks * devices + micro_batches - 1)


def parse(text: str) -> list[Operation]:
    """Parse operations: `F3.1` is the forward of micro-batch 3 on chunk 1, `B3` the backward of micro-batch 3 on chunk 0."""
    operations = []
    for word in text.split():
        micro_batch, _, chunk = word[1:].partition(".")
        operations.append(Operation("forward" if word[0] == "F" else "backward", int(micro_batch), int(chunk or 0)))
    return operations


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("devices,micro_batches,window", CHUNKED_SIZES)
def test_each_micro_batch_once_in_the_documented_order_on_every_virtual_stage(devices, micro_batches, window, chunks):
    for device in range(devices):
        operations = segment_schedule(devices, device, micro_batches, window, virtual_stages=chunks)
        assert {operation.chunk for operation in operations} == set(range(chunks))
        for chunk in range(chunks):
            of_chunk = [operation for operation in operations if operation.chunk == chunk]
            forwards = [operation.micro_batch for operation in of_chunk if operation.kind == "forward"]
            backwards = [operation.micro_batch for operation in of_chunk if operation.kind == "backward"]
            assert forwards == list(range(micro_batches))
            assert backwards == backward_order(micro_batches, window)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("devices,micro_batches,window", CHUNKED_SIZES)
def test_both_ends_of_every_link_transfer_in_the_same_order(devices, micro_batches, window, chunks):
    """The links include the one from the last device back to the first. A single device has a link to itself."""
    lists = [segment_schedule(devices, device, micro_batches, window, virtual_stages=chunks) for device in range(devices)]

    def transfers(device: int, kind: str, step: int) -> list[tuple[int, int]]:
        """Return pairs (receiving virtual stage, micro-batch).

        Args:
            step: difference between the receiving virtual stage and the operation's virtual stage.
        """
        taken = [
            (operation.chunk * devices + device + step, operation.micro_batch)
            for operation in lists[device]
            if operation.kind == kind
        ]
        ends = (0,) if kind == "forward" else (devices * chunks - 1,)  # these receive nothing over a link
        return [pair for pair in taken if 0 <= pair[0] < devices * chunks and not (step == 0 and pair[0] in ends)]

    messages = 0
    for device in range(devices):
        following = (device + 1) % devices
        sent = transfers(device, "forward", 1)
        assert sent == transfers(following, "forward", 0)
        assert transfers(following, "backward", -1) == transfers(device, "backward", 0)
        messages += len(sent)
    assert messages == (devices * chunks - 1) * micro_batches


def test_backwards_run_in_window_order_and_in_reverse_within_a_window():
    assert backward_order(8, 4) == [3, 2, 1, 0, 7, 6, 5, 4]
    assert backward_order(5, 3) == [2, 1, 0, 4, 3]


def test_the_lists_of_two_devices_in_full():
    assert segment_schedule(2, 0, 4, 2) == parse("F0 F1 F2 B1 F3 B0 B3 B2")
    assert segment_schedule(2, 1, 4, 2) == parse("F0 F1 B1 F2 B0 F3 B3 B2")
    assert segment_schedule(2, 0, 4, 2, virtual_stages=2) == parse(
        "F0.0 F1.0 F0.1 F1.1 F2.0 B1.1 F3.0 B0.1 F2.1 B1.0 F3.1 B0.0 B3.1 B2.1 B3.0 B2.0"
    )
    assert segment_schedule(2, 1, 4, 2, virtual_stages=2) == parse(
        "F0.0 F1.0 F0.1 F1.1 B1.1 F2.0 B0.1 F3.0 B1.0 F2.1 B0.0 F3.1 B3.1 B2.1 B3.0 B2.0"
    )
    # Groups stay small in a long window, so the first device soon receives the hidden states of the last device.
    assert segment_schedule(2, 1, 4, 4, virtual_stages=2) == parse(
        "F0.0 F1.0 F0.1 F1.1 F2.0 F3.0 F2.1 F3.1 B3.1 B2.1 B3.0 B2.0 B1.1 B0.1 B1.0 B0.0"
    )


@pytest.mark.parametrize("devices,micro_batches,window", CHUNKED_SIZES)
def test_one_chunk_is_the_plain_schedule(devices, micro_batches, window):
    """The expected order is warm-up forwards, then pairs of forward and backward, then the remaining backwards."""
    for device in range(devices):
        warmup = min(micro_batches, devices - device - 1 + min(window, micro_batches) - 1)
        backwards = [Operation("backward", index) for index in backward_order(micro_batches, window)]
        expected = [Operation("forward", index) for index in range(warmup)]
        for done, index in enumerate(range(warmup, micro_batches)):
            expected += [Operation("forward", index), backwards[done]]
        expected += backwards[micro_batches - warmup :]
        assert segment_schedule(devices, device, micro_batches, window) == expected
        assert segment_schedule(devices, device, micro_batches, window, virtual_stages=1) == expected


@pytest.mark.parametrize("devices,micro_batches,window", SIZES)
def test_live_micro_batches_do_not_depend_on_the_streams_length(devices, micro_batches, window):
    for device, most in enumerate(simulate(devices, micro_batches, window).most_live):
        assert most == min(micro_batches, devices - device + min(window, micro_batches) - 1)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(
    "devices,micro_batches,window,largest_block",
    [
        (4, 16, 1, 4),
        (4, 160, 1, 4),
        (4, 16, 4, 4),
        (4, 16, 8, 8),
        (4, 160, 8, 8),
        (4, 160, 160, 160),
        (4, 24, 6, 6),
        (4, 24, 3, 6),
        (4, 22, 6, 6),  # the 4 remaining micro-batches form a block
        (4, 21, 6, 9),  # the 3 remaining micro-batches join the previous window
        (4, 201, 6, 9),
        (4, 20, 3, 8),  # 2 micro-batches remain
        (8, 23, 2, 12),  # 7 micro-batches remain: the windows form blocks of 12 and 11
        (4, 3, 2, 3),
        (1, 9, 2, 2),
    ],
)
def test_live_chunks_are_bounded_by_the_largest_block(devices, micro_batches, window, largest_block, chunks):
    for device, most in enumerate(simulate(devices, micro_batches, window, chunks).most_live):
        bound = devices - device + window - 1 + (chunks - 1) * largest_block
        assert most == min(chunks * micro_batches, bound)


@pytest.mark.parametrize("devices,micro_batches", [(2, 8), (4, 16), (8, 64), (16, 40)])
def test_bubble_equals_the_formula_for_windows_of_one(devices, micro_batches):
    """If forwards and backwards take equal time, the total time is 2 N plus a bubble of 2 (P - 1)."""
    assert simulate(devices, micro_batches, 1).time == 2 * (micro_batches + devices - 1)


@pytest.mark.parametrize("window", [2, 4, 8])
def test_a_window_adds_no_bubble(window):
    assert simulate(4, 32, window).time == 2 * (32 + 4 - 1)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(
    "devices,micro_batches,window", [(2, 8, 4), (4, 16, 1), (4, 16, 5), (4, 17, 6), (4, 4, 4), (8, 40, 40)]
)
def test_chunks_divide_the_bubble(devices, micro_batches, window, chunks):
    """A chunk operation takes 1/v of a stage's. In chunk operations, the work is 2 v N and the bubble is still 2 (P - 1)."""
    assert simulate(devices, micro_batches, window, chunks).time == 2 * (chunks * micro_batches + devices - 1)


@pytest.mark.parametrize("forward_time,backward_time", [(1, 1), (1, 2)])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("devices,micro_batches,window", CHUNKED_SIZES)
def test_runs_without_deadlock_and_reaches_the_ideal_time(devices, micro_batches, window, chunks, forward_time, backward_time):
    time = simulate(devices, micro_batches, window, chunks, forward_time, backward_time).time
    assert 2 * time == (forward_time + backward_time) * ideal_time(devices, micro_batches, chunks)


def test_every_small_size_reaches_the_ideal_time_within_the_memory_bound():
    for devices in range(1, 6):
        for micro_batches in range(1, 14):
            for window in range(1, micro_batches + 2):
                block = window * -(-devices // window)
                left_over = micro_batches % block
                largest_block = block + (left_over if left_over < devices else 0)
                for chunks in range(1, 4):
                    size = f"P={devices} N={micro_batches} W={window} v={chunks}"
                    run = simulate(devices, micro_batches, window, chunks)
                    assert run.time == ideal_time(devices, micro_batches, chunks), size
                    idle = 1 - 2 * chunks * micro_batches / run.time
                    assert pipeline_bubble(devices, micro_batches, virtual_stages=chunks) == pytest.approx(idle), size
                    for device, most in enumerate(run.most_live):
                        assert most <= devices - device + window - 1 + (chunks - 1) * largest_block, size
                    assert largest_block <= 2 * devices + window - 2, size


def test_a_large_run_has_the_documented_bubble_and_memory():
    """Simulate a stream of 8 million tokens in micro-batches of 2048 tokens on 64 devices."""
    devices, micro_batches, window = 64, 4096, 512
    run = simulate(devices, micro_batches, window)
    assert run.time == 2 * (micro_batches + devices - 1)
    assert run.most_live == [devices - device + window - 1 for device in range(devices)]


def test_a_large_run_with_chunks_has_the_documented_bubble_and_memory():
    devices, micro_batches, window, chunks = 16, 1024, 128, 4
    run = simulate(devices, micro_batches, window, chunks)
    assert run.time == 2 * (chunks * micro_batches + devices - 1)
    assert run.most_live == [devices - device + chunks * window - 1 for device in range(devices)]


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="num_micro_batches 0"):
        segment_schedule(2, 0, 0, 1)
    with pytest.raises(ValueError, match="virtual_stages 0"):
        segment_schedule(2, 0, 4, 1, virtual_stages=0)
    with pytest.raises(ValueError, match="stage 2 is not in a pipeline of 2"):
        segment_schedule(2, 2, 4, 1)
