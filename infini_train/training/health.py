"""What a run does about its own health: steps that are skipped, losses that stand out, and when to stop."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from infini_train import platform
from infini_train.attention import LayerMemory
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.errors import UnhealthyRun
from infini_train.model.micro_batch import Memory
from infini_train.parallel.layout import Layout
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
        for part in (state.M, state.z):
            poisoned[rows.start : rows.stop] += (~torch.isfinite(part)).flatten(1).any(dim=1)
    dist.all_reduce(poisoned)
    clean = poisoned[rows.start : rows.stop] == 0
    return {
        # Not a product: NaN times 0 is NaN.
        layer: LayerMemory(
            torch.where(clean[:, None, None, None], state.M, 0.0), torch.where(clean[:, None, None], state.z, 0.0)
        )
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
    newest = f"the newest checkpoint, {saved[-1]}, is from before them" if saved else "no checkpoint was saved before them"
    raise UnhealthyRun(
        f"{count} steps in a row had a gradient that is not finite and were skipped (health.max_consecutive_skips), the last "
        f"of them step {state.step}; {newest}: start again with a lower optimizer.learning_rate, or look at the data"
    )
