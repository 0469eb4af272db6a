"""Time to save and load a run's state on two processes (ZeRO-1), compared with torch.distributed.checkpoint and DeepSpeed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch.multiprocessing as multiprocessing

from benchmarks.one_process import OneDocument
from infini_train.config import DataConfig, LayoutConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig

PROCESSES = 2
ROUNDS = 3
MODEL = ModelConfig(
    num_layers=6,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
    ffn_hidden_size=1536,
    segment_length=64,
)


def rank(number: int, port: int, root: str, results: Any) -> None:
    """Run all measurements on one process. Each ends with a barrier, so its time is the time of the slower process."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    from infini_train.runtime import platform

    platform.install()
    import torch
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    from infini_train.checkpoint.checkpointer import newest_checkpoint
    from infini_train.parallel.deepspeed.optimizer_state import read_optimizer_state
    from infini_train.resilience.stop_request import StopRequest
    from infini_train.training.step import train_step
    from infini_train.training.training_run import build_training_run

    torch.set_num_threads(1)
    run = RunConfig(
        run_dir=f"{root}/run",
        model=MODEL,
        data=DataConfig(vocab_size=8192),
        layout=LayoutConfig(zero_stage=1),
        training=TrainingConfig(steps=1000, rows=2, micro_batches_per_window=2),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
    dataset = OneDocument(run.data.vocab_size, 1 << 20)
    dataset.document_lengths = dataset.document_lengths.repeat(PROCESSES)  # one document per row
    dataset.available = dataset.available.repeat(PROCESSES)
    training = build_training_run(run, dataset)
    train_step(training, StopRequest())
    whole = read_optimizer_state(training.engine)
    flat = {f"{kind}.{name}": tensor for kind, tensors in whole.items() for name, tensor in tensors.items()}
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in flat.values()) / 1e9
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    writer = training.checkpointer.writer
    for round_number in range(ROUNDS):
        for asynchronous in (True, False):
            name = "ours, beside training" if asynchronous else "ours, waiting"
            run.checkpoint.asynchronous = asynchronous
            training.state.step += 1
            timed(f"{name}: pause", lambda: training.checkpointer.save(training.engine, training.state))
            training.checkpointer.finish(must_succeed=True)
            if number == 0:
                seconds.setdefault(f"{name}: durable", []).append(writer.report()["checkpoint_durable_seconds"])
        newest: list[Any] = []
        timed("ours: verify", lambda: newest.append(newest_checkpoint(Path(run.run_dir), print)))  # noqa: B023
        timed("ours: load", lambda: training.checkpointer.load(newest[-1], training.engine, training.state))  # noqa: B023
        plain = f"{root}/dcp{round_number}"
        timed("torch.distributed.checkpoint: save", lambda: dcp.save(flat, checkpoint_id=plain))  # noqa: B023
        timed("torch.distributed.checkpoint: load", lambda: dcp.load(flat, checkpoint_id=plain))  # noqa: B023
        theirs = f"{root}/deepspeed{round_number}"
        timed("DeepSpeed: save_checkpoint", lambda: training.engine.deepspeed.save_checkpoint(theirs))  # noqa: B023
    # Run once, and last: after it, DeepSpeed's functions no longer find the moments.
    timed("DeepSpeed: load_checkpoint", lambda: training.engine.deepspeed.load_checkpoint(f"{root}/deepspeed0"))
    if number == 0:
        results.put((gigabytes, seconds))


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return the median seconds over the rounds, also per gigabyte of weights and moments. Each round runs all variants."""
    root = tempfile.mkdtemp(prefix="checkpoint-benchmark-")
    try:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(rank, args=(29700 + os.getpid() % 1000, root, results), nprocs=PROCESSES)
        gigabytes, seconds = results.get()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    rows = [
        {"what": name, "seconds": median(times), "seconds per GB": median(times) / gigabytes, "slowest": max(times)}
        for name, times in seconds.items()
    ]
    pause = {row["what"]: row["seconds"] for row in rows}
    share = pause["ours, beside training: pause"] / pause["torch.distributed.checkpoint: save"]
    return rows, [
        f"{gigabytes:.2f} GB of weights and moments on {PROCESSES} processes; training pauses for {share:.2f} of the time that "
        "torch.distributed.checkpoint's own save takes"
    ]
