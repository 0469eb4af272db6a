"""Host time of a layer, which must be shorter than its GPU time.

Without a GPU, this measures the processor time of the memory operation on one thread, without kernel launches. It alternates
between custom operators and direct calls. On a GPU, it measures training steps of 1B with micro-batches so small that the GPU
waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from benchmarks.one_process import import_trainer, in_own_process
from benchmarks.run import progress
from infini_kernels import infini_attention
from infini_kernels.triton import blocks
from infini_kernels.triton.operator import as_custom_operators

SEGMENTS, SEGMENT, ROWS = 2, 16, 2
"""Few tokens, because local attention is computed on the CPU."""
ROUNDS, CALLS = 30, 20
prepare = import_trainer
WAYS: dict[str, Callable[[], Any]] = {"custom operators": as_custom_operators, "called directly": nullcontext}


def layer(rule: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return two functions that run one layer as training does: forward, and forward and backward."""
    shapes = [(ROWS, SEGMENTS * SEGMENT, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    gate = torch.zeros(4, requires_grad=True)
    angle = torch.randn(SEGMENT, 8)
    lengths = torch.full((ROWS, SEGMENTS), SEGMENT)
    reset = torch.zeros(ROWS, SEGMENTS, dtype=torch.bool)
    options: dict[str, Any] = {"segment_length": SEGMENT, "update_rule": rule, "rotary": (angle.cos(), angle.sin())}
    options |= {"lengths": lengths, "reset": reset, "backend": "triton"}

    def forward() -> Any:
        return infini_attention(q, k, v, gate, **options)

    def both() -> None:
        out, memory = forward()
        torch.autograd.grad((out, memory.M, memory.z), (q, k, v, gate), (out, memory.M, memory.z))

    return forward, both


MICRO_BATCHES = 4
WARMUP, STEPS = 3, 8


def one(variant: str) -> dict[str, Any]:
    """Return the milliseconds of a training step of 1B per layer and micro-batch, forward and backward."""
    from benchmarks import step

    small = {"segments_per_micro_batch": 1, "micro_batches_per_window": MICRO_BATCHES, "fused_layers": "fused"}
    train = step.trainer("1B", variant, WARMUP + STEPS, **small)
    seconds = []
    for _ in range(WARMUP + STEPS):
        started = time.perf_counter()
        train()  # the host waits for the loss at the end
        seconds.append(time.perf_counter() - started)
    return {"ms a layer": 1000 * median(seconds[WARMUP:]) / (step.MODELS["1B"][1] * MICRO_BATCHES)}


def measure_on_gpu() -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each attention."""
    variants = ("infini linear", "infini delta", "local")
    rows = []
    for number, variant in enumerate(variants, 1):
        found = in_own_process("benchmarks.host", others=number < len(variants), variant=variant)
        rows.append(progress({"attention": variant, **found}))
    return rows, [
        "milliseconds for each layer and micro-batch of 2,048 tokens in 2 rows, forward and backward, optimizer included"
    ]


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each rule and way of calling: median microseconds of a call."""
    if torch.cuda.is_available():
        return measure_on_gpu()
    blocks.observers.append(lambda *launch: None)
    rows = []
    try:
        for rule in ("linear", "delta"):
            work = dict(zip(("forward", "both"), layer(rule), strict=True))
            found: dict[tuple[str, str], list[float]] = {(way, name): [] for way in WAYS for name in work}
            for _ in range(ROUNDS):
                for way, name in found:
                    with WAYS[way]():
                        started = time.process_time()
                        for _ in range(CALLS):
                            work[name]()
                        found[way, name].append((time.process_time() - started) / CALLS * 1e6)
            for way in WAYS:
                rows.append({"rule": rule, "way": way, **{f"{name} us": median(found[way, name]) for name in work}})
    finally:
        blocks.observers.pop()
    return rows, ["microseconds of processor time; one layer, lengths and resets on the host, launches left out"]
