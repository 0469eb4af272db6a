"""Split of a micro-batch's segments over the context-parallel group."""

from __future__ import annotations

from infini_train.data.streams import Batch
from infini_train.parallel.layout import Layout


def context_share(batch: Batch, layout: Layout) -> Batch:
    """Return this rank's contiguous run of the micro-batch's segments, in rank order.

    Without context parallelism this is the whole micro-batch.
    """
    if layout.cp_size == 1:
        return batch
    segments = batch.lengths.shape[1] // layout.cp_size
    tokens = batch.tokens.shape[1] // layout.cp_size
    by_token = slice(layout.cp_rank * tokens, (layout.cp_rank + 1) * tokens)
    by_segment = slice(layout.cp_rank * segments, (layout.cp_rank + 1) * segments)
    return Batch(
        tokens=batch.tokens[:, by_token],
        targets=batch.targets[:, by_token],
        loss_mask=batch.loss_mask[:, by_token],
        lengths=batch.lengths[:, by_segment],
        reset=batch.reset[:, by_segment],
        segment_index=batch.segment_index[:, by_segment],
        draws=batch.draws[:, by_segment],
        repeats=batch.repeats[:, by_segment],
    )
