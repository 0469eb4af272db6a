"""One optimizer step over all ranks."""

from __future__ import annotations

import time
from math import isfinite
from typing import Any

from torch.profiler import record_function

from infini_kernels.timing import timed
from infini_train.data.streams import Batch
from infini_train.model.flops import peak_flops, training_flops_per_token
from infini_train.model.memory_ageing import memory_repeats
from infini_train.parallel.context_parallel import context_share
from infini_train.parallel.layout import all_reduce_sum, raise_everywhere
from infini_train.resilience.health import memory_after_skip
from infini_train.resilience.stop_request import StopRequest
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError
from infini_train.training.step_times import STEP
from infini_train.training.training_run import TrainingRun


@record_function(STEP)
def train_step(training: TrainingRun, stop: StopRequest) -> tuple[dict[str, Any], bool]:
    """Train one step. If a gradient is not finite on any rank, all ranks skip the update and continue with the next data.

    Returns:
        The step's metrics, and whether any rank was asked to stop.
    """
    run, layout, state = training.run, training.layout, training.state
    activity = training.pipeline.activity
    activity.step = state.step + 1
    started = time.perf_counter()
    activity.begin("reading data")
    batches, unreadable = _read(training)

    # Count each token once, on the first tensor rank of the first stage. `valid` is the number of tokens read; `weight` is the
    # sum of their loss weights, the denominator of the mean loss. They are equal unless the data has loss weights.
    counts_here = layout.is_first_stage and layout.tp_rank == 0
    valid = float(sum(batch.num_valid for batch in batches)) if counts_here else 0.0
    weight = sum(batch.loss_weight for batch in batches) if counts_here else 0.0
    activity.begin("agreement on the step's data", waits=True)
    total_valid, total_weight, signals, failed = all_reduce_sum(
        [valid, weight, float(stop.signal_number is not None), float(unreadable is not None)]
    )
    if failed:
        raise_everywhere(unreadable)

    # DeepSpeed averages gradients over data and context parallel ranks; the loss is a weighted mean over the global batch's
    # tokens.
    loss_scale = layout.dp_size * layout.cp_size / total_weight
    loss_sum, state.memory = training.pipeline.forward_backward(batches, state.memory, loss_scale)
    activity.begin("optimizer step", waits=True)
    with timed("optimizer"):
        grad_norm = training.engine.step(state.step)
    activity.begin("agreement on the loss", waits=True)
    loss = all_reduce_sum([float(loss_sum) if layout.tp_rank == 0 else 0.0])[0] / total_weight

    activity.begin("metrics")
    activity.set_limit("step")
    skipped = not isfinite(grad_norm)
    if skipped:
        state.memory = memory_after_skip(layout, state.memory, run.training.rows)
    state.step += 1
    state.tokens += 0 if skipped else int(total_valid)
    state.health.skipped_steps += skipped
    state.health.consecutive_skips = state.health.consecutive_skips + 1 if skipped else 0
    seconds = time.perf_counter() - started
    rates = training.engine.learning_rates()
    record: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": loss,
        "grad_norm": grad_norm,
        "skipped": int(skipped),
        "lr": rates["matrices"],
        **({"gate_lr": rates["gates"]} if "gates" in rates else {}),
        "padding": 1.0 - total_valid / run.tokens_per_step,
        "step_seconds": seconds,
        "tokens_per_second": total_valid / seconds,
        "peak_memory": platform.peak_memory(),
    }
    peak = peak_flops()
    if peak is not None:
        flops = training_flops_per_token(run) * record["tokens_per_second"]
        record["mfu"] = flops / (peak * layout.world_size)
    return record, signals > 0


def _read(training: TrainingRun) -> tuple[list[Batch], UserError | None]:
    """Read the step's micro-batches, or return the error: the caller shares it, so that no rank waits for this one."""
    try:
        with timed("data"):
            return [_next(training) for _ in range(training.run.micro_batches_per_step)], None
    except UserError as error:
        return [], error


def _next(training: TrainingRun) -> Batch:
    batch = training.state.reader.next(training.run.training.segments_per_micro_batch)
    assert batch is not None, "a training stream has no end"
    batch.repeats = memory_repeats(training.run.training, training.state.step, batch.draws)
    return context_share(batch, training.layout)
