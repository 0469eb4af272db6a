"""The segment schedule as a pure function: order, dependencies between stages, live micro-batches, bubble."""

from __future__ import annotations

import pytest

from infini_train.parallel.schedule import backward_order, segment_schedule

SIZES = [(1, 1, 1), (1, 8, 4), (2, 8, 8), (2, 5, 2), (3, 7, 3), (4, 16, 4), (4, 3, 8), (8, 64, 16), (16, 40, 1)]


def simulate(stages: int, micro_batches: int, window: int) -> int:
    """Run every stage's operations as their inputs become available, each one unit of time; returns the time.

    Fails on a deadlock, on a backward before its forward, and where a memory gradient would not be there yet.
    """
    pending = [segment_schedule(stages, stage, micro_batches, window) for stage in range(stages)]
    position = [0] * stages
    done: dict[tuple[str, int, int], int] = {}
    free_at = [0] * stages
    while any(position[stage] < len(pending[stage]) for stage in range(stages)):
        moved = False
        for stage in range(stages):
            if position[stage] == len(pending[stage]):
                continue
            operation = pending[stage][position[stage]]
            needs = []
            if operation.kind == "forward":
                needs += [("forward", stage - 1, operation.micro_batch)] if stage else []
                needs += [("forward", stage, operation.micro_batch - 1)] if operation.micro_batch else []
            else:
                needs.append(("forward", stage, operation.micro_batch))
                needs += [("backward", stage + 1, operation.micro_batch)] if stage + 1 < stages else []
                following = operation.micro_batch + 1
                if following % window and following < micro_batches:
                    needs.append(("backward", stage, following))
            if all(need in done for need in needs):
                start = max([free_at[stage], *(done[need] for need in needs)])
                free_at[stage] = done[operation.kind, stage, operation.micro_batch] = start + 1
                position[stage] += 1
                moved = True
        assert moved, "deadlock"
    return max(free_at)


@pytest.mark.parametrize("stages,micro_batches,window", SIZES)
def test_runs_without_deadlock_and_with_every_gradient(stages, micro_batches, window):
    simulate(stages, micro_batches, window)


@pytest.mark.parametrize("stages,micro_batches,window", SIZES)
def test_each_micro_batch_once_in_the_documented_order(stages, micro_batches, window):
    for stage in range(stages):
        operations = segment_schedule(stages, stage, micro_batches, window)
        forwards = [operation.micro_batch for operation in operations if operation.kind == "forward"]
        backwards = [operation.micro_batch for operation in operations if operation.kind == "backward"]
        assert forwards == list(range(micro_batches))
        assert backwards == backward_order(micro_batches, window)


def test_backwards_ascend_by_window_and_descend_inside():
    assert backward_order(8, 4) == [3, 2, 1, 0, 7, 6, 5, 4]
    assert backward_order(5, 3) == [2, 1, 0, 4, 3]


@pytest.mark.parametrize("stages,micro_batches,window", SIZES)
def test_live_micro_batches_do_not_depend_on_the_streams_length(stages, micro_batches, window):
    for stage in range(stages):
        live = most = 0
        for operation in segment_schedule(stages, stage, micro_batches, window):
            live += 1 if operation.kind == "forward" else -1
            most = max(most, live)
        assert live == 0
        assert most <= min(micro_batches, stages - stage + window - 1)


@pytest.mark.parametrize("stages,micro_batches", [(2, 8), (4, 16), (8, 64), (16, 40)])
def test_bubble_equals_the_formula_for_windows_of_one(stages, micro_batches):
    """With equal forwards and backwards, the time is 2 N plus a bubble of 2 (P - 1)."""
    assert simulate(stages, micro_batches, 1) == 2 * (micro_batches + stages - 1)


@pytest.mark.parametrize("window", [2, 4, 8])
def test_a_window_adds_no_bubble(window):
    assert simulate(4, 32, window) == 2 * (32 + 4 - 1)


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="num_micro_batches 0"):
        segment_schedule(2, 0, 0, 1)
    with pytest.raises(ValueError, match="stage 2 is not in a pipeline of 2"):
        segment_schedule(2, 2, 4, 1)
