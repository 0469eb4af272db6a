"""What a run does about its own health: steps that are skipped, losses that stand out, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from infini_train import platform
from infini_train.attention import map_parts
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.errors import UnhealthyRun
from infini_train.model.micro_batch import Memory
from infini_train.parallel.layout import Layout, all_reduce_sum
from infini_train.training.checkpoint import newest_checkpoint
from infini_train.training.setup import Parts


@torch.no_grad()
def memory_after_skip(layout: Layout, memory: Memory, total_rows: int) -> Memory:
    """The memory that streams carry on after a skipped step; a collective over all processes.

    A row whose memory is finite in every layer and head keeps it: it is what the unchanged weights make of the text that was
    read. Any other row starts anew with an empty memory, in all layers. The memory from before the step is no choice for it: a
    document may have begun meanwhile, and would go on with another one's memory.
    """
    rows = layout.rows(total_rows)
    poisoned = torch.zeros(total_rows, device=platform.device())
    for state in memory.values():
        for part in state:
            poisoned[rows.start : rows.stop] += (~torch.isfinite(part)).reshape(len(part), -1).any(dim=1)
    dist.all_reduce(poisoned)
    clean = poisoned[rows.start : rows.stop] == 0
    return {
        # Not a product: NaN times 0 is NaN.
        layer: map_parts(lambda part: torch.where(clean.view(-1, *[1] * (part.dim() - 1)), part, 0), state)
        for layer, state in memory.items()
    }


def stop_after_skips(parts: Parts) -> None:
    """End a run whose steps are all skipped.

    Raises:
        UnhealthyRun: health.max_consecutive_skips is reached.
    """
    run, state = parts.run, parts.state
    count = state.health.consecutive_skips
    if count < run.health.max_consecutive_skips:
        return
    parts.checkpointer.finish()
    saved = list_checkpoints(Path(run.run_dir))
    # A run that was stopped among them, or ended with one, saved what they left as it was.
    newest = f"the newest checkpoint, {saved[-1]}, has the weights from before them" if saved else "no checkpoint was saved yet"
    raise UnhealthyRun(
        f"{count} steps in a row had a gradient that is not finite and were skipped (health.max_consecutive_skips), the last "
        f"of them step {state.step}; {newest}: start again with a lower optimizer.learning_rate, or look at the data"
    )


def robust_zscore(value: float, window: list[float]) -> float:
    """Distance from the window's median in robust standard deviations, which a few outliers in the window do not move.

    A deviation is at least 1% of the median: in a very even window everything else would stand out.
    """
    middle = median(window)
    deviation = 1.4826 * median(abs(each - middle) for each in window)
    return (value - middle) / max(deviation, 0.01 * abs(middle), 1e-12)


def loss_spiked(parts: Parts, record: dict[str, Any]) -> bool:
    """Whether the step's loss stands out above those before it, the same on all processes; the loss joins the window.

    Adds `loss_zscore` to the record once the window is full. A spike joins it too, so that a loss that stays high (a new kind
    of text) is news for half a window at most.
    """
    config, health, loss = parts.run.health, parts.state.health, record["loss"]
    if config.spike_zscore == 0 or record["skipped"] or not isfinite(loss):
        return False
    spiked = False
    if len(health.recent_losses) == config.spike_window:
        record["loss_zscore"] = robust_zscore(loss, health.recent_losses)
        spiked = record["loss_zscore"] > config.spike_zscore
    if config.on_spike == "rollback":
        # Processes have reduced the same loss to the same bits; a rollback by some of them would be fatal all the same.
        spiked = all_reduce_sum([float(spiked)])[0] > 0
    health.recent_losses = [*health.recent_losses, loss][-config.spike_window :]
    health.spikes += spiked
    return spiked


def roll_back(parts: Parts, on_damage: Callable[[str], None]) -> Path | None:
    """Go back to the newest checkpoint and read on behind the newest step; a collective over all processes.

    Args:
        on_damage: see `newest_checkpoint`.

    Returns:
        The checkpoint; None if there is none yet, and nothing was changed.

    Raises:
        UnhealthyRun: health.max_rollbacks is reached.
        AgreedError: no checkpoint can be read.
    """
    state, limit = parts.state, parts.run.health.max_rollbacks
    if state.health.rollbacks >= limit:
        raise UnhealthyRun(
            f"the loss of step {state.step} is a spike after {limit} rollbacks (health.max_rollbacks): start again with a "
            "lower optimizer.learning_rate, or raise health.spike_zscore if the loss is as it should be"
        )
    with parts.pipeline.activity.during("search for a whole checkpoint", limit="save"):
        parts.checkpointer.finish()
        checkpoint = newest_checkpoint(Path(parts.run.run_dir), on_damage)
    if checkpoint is None:
        return None
    positions, spikes, rollbacks = state.reader.state(), state.health.spikes, state.health.rollbacks
    with parts.pipeline.activity.during("load of a checkpoint", limit="save"):
        parts.checkpointer.load(checkpoint, parts.engine, state)
    state.reader.load_state(positions)
    # The checkpoint's memory belongs to text before these positions, and the memory of now was written by weights given up.
    state.memory = {layer: map_parts(torch.zeros_like, each) for layer, each in state.memory.items()}
    state.health.spikes, state.health.rollbacks = spikes, rollbacks + 1
    return checkpoint
