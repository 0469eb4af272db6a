"""Cost of memory ageing: one layer's operation, forward and backward, with the geometry of `configs/passkey-cpu.yaml`.

The variants are no ageing and several bounds of the repeat counts, as they rise in training. The result is processor time, as
the median over rounds. Each round runs every variant, so other work on the machine affects all variants equally.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from infini_kernels import infini_attention
from infini_train.config import TrainingConfig
from infini_train.model.memory_ageing import memory_repeats

ROWS, SEGMENTS, SEGMENT, HEADS, WIDTH = 2, 32, 64, 4, 32
BOUNDS = (None, 1, 100, 10_000)
"""Bounds of the repeat counts. None is the operation without counts."""
ROUNDS = 15


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return milliseconds for each rule and bound, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = ROWS, SEGMENTS * SEGMENT, HEADS, WIDTH
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    gate = torch.zeros(HEADS, requires_grad=True)

    def once(rule: str, repeats: Tensor | None) -> float:
        started = time.process_time()
        out = infini_attention(q, k, v, gate, segment_length=SEGMENT, update_rule=rule, repeats=repeats)[0]
        torch.autograd.grad(out, (q, k, v, gate), torch.ones_like(out))
        return 1000 * (time.process_time() - started)

    rows = []
    for rule in ("linear", "delta"):
        times: dict[int | None, list[float]] = {bound: [] for bound in BOUNDS}
        for number in range(ROUNDS + 1):
            draws = torch.rand(ROWS, SEGMENTS, 2, generator=generator)
            for bound, found in times.items():
                ageing = TrainingConfig(memory_ageing=bound or 1, memory_ageing_rise=0.0)
                taken = once(rule, None if bound is None else memory_repeats(ageing, 0, draws))
                if number:  # the first round warms up
                    found.append(taken)
        medians = {bound: statistics.median(found) for bound, found in times.items()}
        rows += [
            {"rule": rule, "bound": bound or "none", "ms": median, "of none": median / medians[None]}
            for bound, median in medians.items()
        ]
    return rows, [f"{ROWS} rows of {SEGMENTS} segments of {SEGMENT} tokens, {HEADS} heads of {WIDTH}, bfloat16, one thread"]
