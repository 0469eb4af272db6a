"""The attention operation with its segments spread over processes: results, every gradient, and its communication."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("processes,segments", [(2, 2), (2, 6), (4, 8)])
def test_equals_one_process(rule, processes, segments, pool):
    """The input has resets, padding inside the row and an incoming memory, whose gradient is the sum over the processes."""
    for result in pool(processes).run("tests.support.distributed.jobs", "context_parallel_operation", rule, 5, segments):
        for name, difference in result["differences"].items():
            assert difference < 1e-9, f"{name} differs by {difference}"


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_bytes_sent_do_not_depend_on_the_segments(rule, pool):
    """A layer sends z and its factor, and per head D x Dv values of M with a factor (linear) or a D x D matrix (delta)."""
    counts = {
        result["bytes"]
        for size, segments in ((4, 4), (32, 4), (8, 16))
        for result in pool(2).run("tests.support.distributed.jobs", "context_parallel_operation", rule, size, segments)
    }
    B, G, D, Dv, double = 2, 2, 6, 5, 8
    factor = 1 if rule == "linear" else D
    assert counts == {B * G * (1 + D + D * (factor + Dv)) * double}


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_the_exchange_overlaps_with_the_local_attention(rule, pool):
    """The exchange is in progress during the local attention, in forward and backward. The delta rule sends z before it."""
    for result in pool(2).run("tests.support.distributed.jobs", "context_parallel_operation", rule, 5, 4):
        forward = ["gather started", "gather started", "local attention", "gather waited for", "gather waited for"]
        if rule == "delta":
            forward = ["gather started", "gather waited for", "gather started", "local attention", "gather waited for"]
        assert result["events"][:5] == forward
        backward = result["events"][5:]
        local = backward.index("local attention backward")
        assert "reduction started" in backward[:local] and "reduction waited for" not in backward[:local]
        assert sorted(backward)[1:] == ["reduction started"] * 2 + ["reduction waited for"] * 2
