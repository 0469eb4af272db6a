"""Pipeline bubble with a fixed sleep in place of each stage's work, compared with (P - 1) / (v N + P - 1).

P is the number of stages, v the number of virtual stages and N the number of micro-batches.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from infini_train.config import LayoutConfig, RunConfig
from infini_train.parallel.schedule import segment_schedule

FORWARD, BACKWARD = 0.1, 0.2
"""Seconds that a stage works on a micro-batch; each of its v chunks takes 1/v of that."""
CASES = ((2, 1, 8, 4), (2, 1, 32, 8), (2, 2, 8, 4), (4, 1, 8, 4), (4, 1, 32, 8), (4, 1, 32, 32), (4, 2, 8, 4), (4, 2, 32, 8))
"""Stages, virtual stages, micro-batches, window."""


def stage(rank: int, stages: int, virtual: int, micro_batches: int, window: int, port: int, results: Any) -> None:
    """Run one stage with the schedule and transport of training, and with sleeps instead of computation."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(stages), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    from infini_train.runtime import platform

    platform.install()
    from infini_train.parallel.layout import initialize_layout
    from infini_train.parallel.transport import StageTransport

    torch.set_num_threads(1)
    initialize_layout(RunConfig(layout=LayoutConfig(pipeline_parallel_size=stages, virtual_stages=virtual)))
    transport = StageTransport((64, 1, 64), torch.float32, torch.device("cpu"), virtual)
    hidden = torch.zeros(64, 1, 64)
    operations = segment_schedule(stages, rank, micro_batches, window, virtual_stages=virtual)
    seconds = 0.0
    for _ in range(2):  # the first round opens the connections
        torch.distributed.barrier()
        started = time.perf_counter()
        for operation in operations:
            if operation.kind == "forward":
                transport.receive_forward(operation.chunk)
                time.sleep(FORWARD / virtual)
                transport.send_forward(hidden, operation.chunk)
            else:
                transport.receive_backward(operation.chunk)
                time.sleep(BACKWARD / virtual)
                transport.send_backward(hidden, operation.chunk)
        transport.wait_sends()
        torch.distributed.barrier()
        seconds = time.perf_counter() - started
    if rank == 0:
        results.put(seconds)


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return one row for each case. The bubble is the fraction of the step in which a stage is idle."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for number, (stages, virtual, micro_batches, window) in enumerate(CASES):
        results = context.SimpleQueue()
        port = 29600 + os.getpid() % 1000 + number
        multiprocessing.spawn(stage, args=(stages, virtual, micro_batches, window, port, results), nprocs=stages)
        seconds = results.get()
        bubble = 1 - micro_batches * (FORWARD + BACKWARD) / seconds
        formula = (stages - 1) / (virtual * micro_batches + stages - 1)
        rows.append(
            {
                "stages": stages,
                "virtual stages": virtual,
                "micro-batches": micro_batches,
                "window": window,
                "bubble": bubble,
                "formula": formula,
                "difference": bubble - formula,
            }
        )
    worst = max(abs(row["difference"]) for row in rows)
    return rows, [f"largest difference from the formula: {100 * worst:.2f} points"]
