"""Health checks of a run: skipped steps, loss spikes and rollbacks, and when to stop the run."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from infini_train.attention import map_tensors
from infini_train.checkpoint.checkpointer import Checkpointer, newest_checkpoint
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.checkpoint.training_state import HealthCounters, TrainingState
from infini_train.config import HealthConfig, RunConfig
from infini_train.model.layer_context import Memory
from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.layout import Layout, all_reduce_sum
from infini_train.runtime import platform
from infini_train.runtime.activity import Activity
from infini_train.runtime.errors import UnhealthyRun


@torch.no_grad()
def memory_after_skip(layout: Layout, memory: Memory, total_rows: int) -> Memory:
    """Return the memory with which streams continue after a skipped step. A collective over all ranks.

    A row whose memory is finite in every layer and head keeps it, because the unchanged weights computed it from the text of
    the step. Any other row continues with an empty memory in all layers. Its memory from before the step cannot be restored: a
    new document may have started in the step, and must not see the memory of the previous one.
    """
    rows = layout.rows(total_rows)
    poisoned = torch.zeros(total_rows, device=platform.device())
    for state in memory.values():
        for tensor in state:
            poisoned[rows.start : rows.stop] += (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(dim=1)
    dist.all_reduce(poisoned)
    clean = poisoned[rows.start : rows.stop] == 0
    return {
        # Not multiplication by a mask: NaN times 0 is NaN.
        layer: map_tensors(lambda tensor: torch.where(clean.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0), state)
        for layer, state in memory.items()
    }


def stop_after_skips(run: RunConfig, state: TrainingState, checkpointer: Checkpointer) -> None:
    """Stop a run that keeps skipping steps.

    Raises:
        UnhealthyRun: the last health.max_consecutive_skips steps were all skipped.
    """
    count = state.health.consecutive_skips
    if count < run.health.max_consecutive_skips:
        return
    checkpointer.finish()
    saved = list_checkpoints(Path(run.run_dir))
    # This holds even if the checkpoint was saved between skipped steps: they do not change the weights.
    newest = f"the newest checkpoint, {saved[-1]}, has the weights from before them" if saved else "no checkpoint was saved yet"
    raise UnhealthyRun(
        f"{count} steps in a row had a gradient that is not finite and were skipped (health.max_consecutive_skips), the last "
        f"of them step {state.step}; {newest}: start again with a lower optimizer.learning_rate, or look at the data"
    )


def robust_zscore(value: float, window: list[float]) -> float:
    """Return a value's distance from the window's median, in robust standard deviations.

    The robust standard deviation is 1.4826 times the median absolute deviation, so a few outliers do not change it. It is at
    least 1% of the median; otherwise any change would be a spike after a nearly constant loss.
    """
    middle = median(window)
    deviation = 1.4826 * median(abs(each - middle) for each in window)
    return (value - middle) / max(deviation, 0.01 * abs(middle), 1e-12)


def loss_spiked(config: HealthConfig, health: HealthCounters, record: dict[str, Any]) -> bool:
    """Return whether the step's loss is a spike above the losses in the window, and add it to the window.

    The result is the same on all ranks. Once the window is full, `loss_zscore` is added to the record. Spikes are added to the
    window too. So if the loss stays high, as on a new kind of text, it is reported for half a window at most.
    """
    loss = record["loss"]
    if config.spike_zscore == 0 or record["skipped"] or not isfinite(loss):
        return False
    spiked = False
    if len(health.recent_losses) == config.spike_window:
        record["loss_zscore"] = robust_zscore(loss, health.recent_losses)
        spiked = record["loss_zscore"] > config.spike_zscore
    if config.on_spike == "rollback":
        # All ranks should have the same loss bit for bit. Agree anyway: a rollback on only some ranks would be fatal.
        spiked = all_reduce_sum([float(spiked)])[0] > 0
    health.recent_losses = [*health.recent_losses, loss][-config.spike_window :]
    health.spikes += spiked
    return spiked


def roll_back(
    run: RunConfig,
    engine: Engine,
    state: TrainingState,
    checkpointer: Checkpointer,
    activity: Activity,
    on_damage: Callable[[str], None],
) -> Path | None:
    """Load the newest checkpoint, but continue reading the streams after the newest step. A collective over all ranks.

    Args:
        on_damage: see `newest_checkpoint`.

    Returns:
        The checkpoint; None if there is none yet, and then nothing has changed.

    Raises:
        UnhealthyRun: the run has already rolled back health.max_rollbacks times.
        AgreedError: no checkpoint is intact.
    """
    limit = run.health.max_rollbacks
    if state.health.rollbacks >= limit:
        raise UnhealthyRun(
            f"the loss of step {state.step} is a spike after {limit} rollbacks (health.max_rollbacks): start again with a "
            "lower optimizer.learning_rate, or raise health.spike_zscore if the loss is normal"
        )
    with activity.during("search for an intact checkpoint", limit="save"):
        checkpointer.finish()
        checkpoint = newest_checkpoint(Path(run.run_dir), on_damage)
    if checkpoint is None:
        return None
    positions, spikes, rollbacks = state.reader.state(), state.health.spikes, state.health.rollbacks
    with activity.during("load of a checkpoint", limit="save"):
        checkpointer.load(checkpoint, engine, state)
    state.reader.load_state(positions)
    # The checkpoint's memory belongs to text before these positions; the current memory was written by the discarded weights.
    state.memory = {layer: map_tensors(torch.zeros_like, each) for layer, each in state.memory.items()}
    state.health.spikes, state.health.rollbacks = spikes, rollbacks + 1
    return checkpoint
