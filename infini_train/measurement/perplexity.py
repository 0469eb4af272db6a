"""Held-out loss by position in the document, with the memory kept, emptied at every segment, or taken from another row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from infini_train.attention import map_tensors, with_memory, without_tail
from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import Batch, StreamReader
from infini_train.model.layer_context import Memory
from infini_train.parallel.context_parallel import context_share
from infini_train.parallel.layout import Layout, all_reduce_sum, raise_everywhere
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.runtime.errors import UserError

MAX_POSITIONS = 4096
"""Number of segment positions counted separately. Later segments of a document are added to the last position."""
Treatment = Literal["kept", "emptied", "shuffled"]
"""Treatment of the memory. kept: as in training. emptied: reset at every segment. shuffled: each row reads the memory that
another row has written so far: similarly full, but from another document. The row's own memory is carried on unread."""


@dataclass
class HeldOutLoss:
    """Weighted sums of token losses, sums of the weights, and token counts over all processes.

    All arrays have shape [MAX_POSITIONS]: one entry for each segment position in the document. In data without weights, every
    weight is 1.
    """

    loss_sum: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    own_loss_sum: np.ndarray | None = None
    """For shuffled memory: the loss sums of the same tokens when each row reads its own memory."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self._mean(self.loss_sum)

    @property
    def own_loss(self) -> float:
        """Mean of `own_loss_sum` in nats per token."""
        assert self.own_loss_sum is not None
        return self._mean(self.own_loss_sum)

    def _mean(self, loss_sum: np.ndarray) -> float:
        return float(loss_sum.sum() / (self.weights.sum() or 1.0))


def _batches(run: RunConfig, layout: Layout, dataset: TokenDataset, limit: int | None) -> Iterator[Batch]:
    """Yield micro-batches that read every held-out document once, the longest first.

    Rows without a further document contain padding until all processes are done.
    """
    rows = layout.rows(run.training.rows)
    reader = StreamReader(
        dataset,
        rows,
        run.training.rows,
        run.model.segment_length,
        run.training.seed,
        shuffle=False,
        num_epochs=1,
        longest_first=True,
    )
    num_segments = run.training.segments_per_micro_batch
    count = 0
    while limit is None or count < limit:
        batch, unreadable = None, None
        try:
            batch = reader.next(num_segments)
        except UserError as error:
            unreadable = error
        reading, failed = all_reduce_sum([float(batch is not None), float(unreadable is not None)])
        if failed:
            raise_everywhere(unreadable)
        if reading == 0:
            return
        # Other processes may still have data. Their collectives need a forward pass of this process.
        batch = batch if batch is not None else _padding(len(rows), num_segments, run.model.segment_length)
        yield context_share(batch, layout)
        count += 1


def _padding(rows: int, num_segments: int, segment_length: int) -> Batch:
    """Return a micro-batch without valid tokens."""
    tokens = torch.zeros(rows, num_segments * segment_length, dtype=torch.int64)
    segments = torch.zeros(rows, num_segments, dtype=torch.int64)
    return Batch(
        tokens=tokens,
        targets=tokens,
        loss_mask=tokens.float(),
        lengths=segments,
        reset=torch.ones_like(segments, dtype=torch.bool),
        segment_index=segments,
        draws=torch.zeros(*segments.shape, 2, dtype=torch.float64),
        repeats=torch.ones_like(segments),
    )


class LossByPosition:
    """Sums of the token losses of this process by segment position in the document."""

    def __init__(self, segment_length: int, counts: bool) -> None:
        """Create empty sums.

        Args:
            counts: whether this process adds its losses. Exactly one of the ranks that compute the same losses does.
        """
        self.segment_length, self.counts = segment_length, counts
        self.sums = torch.zeros(3, MAX_POSITIONS, dtype=torch.float64)

    def add(self, batch: Batch, losses: Tensor, rows: Tensor | None = None) -> None:
        """Add the losses of a micro-batch.

        Args:
            losses: [B, T] in nats.
            rows: [B] bool, rows that count; None counts all rows.
        """
        if not self.counts:
            return
        positions = batch.segment_index.clamp(max=MAX_POSITIONS - 1).repeat_interleave(self.segment_length, dim=1).flatten()
        mask = batch.loss_mask.double()
        if rows is not None:
            mask = mask * rows[:, None]
        for sums, values in zip(self.sums, (losses.cpu().double() * mask, mask, (mask > 0).double()), strict=True):
            sums.index_add_(0, positions, values.flatten())

    def total(self) -> HeldOutLoss:
        """Return the sums over all processes; a collective."""
        return HeldOutLoss(*np.array(all_reduce_sum(self.sums.flatten().tolist())).reshape(3, MAX_POSITIONS))


def shuffled_run(run: RunConfig, layout: Layout) -> RunConfig:
    """Return the run to build the pipeline from for shuffled memory.

    It uses the smallest micro-batches, because inside a micro-batch a row reads its own memory.
    """
    return replace(run, training=replace(run.training, segments_per_micro_batch=layout.cp_size))


def held_out_loss(
    run: RunConfig,
    layout: Layout,
    pipeline: SegmentPipeline,
    *,
    memory: Treatment = "kept",
    limit: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    dataset: TokenDataset | None = None,
) -> HeldOutLoss:
    """Measure the loss on the held-out split. A collective over all processes.

    Args:
        run: the run that the pipeline was built from; for shuffled memory, the result of `shuffled_run`.
        memory: treatment of the memory. With shuffled memory, a token counts only if another row of this process had a
            memory to read.
        limit: number of micro-batches to read, longest documents first; None reads every document once.
        on_batch: called with the number of micro-batches done, to show progress.
        dataset: the held-out split, if it is already open.
    """
    dataset = dataset or TokenDataset(Path(run.data.path), "held_out")
    by_position, own = (LossByPosition(run.model.segment_length, counts=layout.tp_rank == 0) for _ in range(2))
    carried: Memory = {}
    reading: Tensor | None = None
    for count, batch in enumerate(_batches(run, layout, dataset, limit), start=1):
        if memory == "shuffled":
            others, rows = memory_of_other_rows(carried, len(batch.tokens), reading)
            pipeline.evaluate([batch], others, partial(by_position.add, rows=rows))
            carried = pipeline.evaluate([batch], carried, partial(own.add, rows=rows))
        else:
            carried = pipeline.evaluate([batch], carried, by_position.add, empty_memory=memory == "emptied")
        # With context parallelism, which only `infini` and `local` support, a process holds only some of the segments.
        reading = batch.lengths[:, -1] > 0 if layout.cp_size == 1 else None
        if on_batch is not None:
            on_batch(count)
    total = by_position.total()
    return replace(total, own_loss_sum=own.total().loss_sum) if memory == "shuffled" else total


def memory_of_other_rows(memory: Memory, num_rows: int, reading: Tensor | None = None) -> tuple[Memory, Tensor]:
    """Replace the memory of each row by the memory of the next row that has written one.

    Convolution tails do not count as memory and stay with their row.

    Args:
        reading: [num_rows] bool, rows whose documents have not ended. Key caches and memory tokens also store padding, so
            their content does not show that a row has ended. None if an all-zero memory is sufficient to tell.

    Returns:
        The memory, and a [num_rows] bool tensor: rows that got the memory of another row. The other rows keep their own.
    """
    if not memory:
        return {}, torch.zeros(num_rows, dtype=torch.bool)
    # One layer is enough: every layer on every stage and tensor rank writes to the same rows, because σ(K) is positive and no
    # key is zero.
    tensors = without_tail(next(iter(memory.values())))
    written = torch.stack([tensor.reshape(len(tensor), -1).ne(0).any(dim=1) for tensor in tensors]).any(dim=0).cpu()
    if reading is not None:
        written &= reading
    filled = [row for row in range(num_rows) if written[row]]
    donors = list(range(num_rows))
    for row in range(num_rows):
        others = [other for other in filled if other != row]
        if others:
            donors[row] = next((other for other in others if other > row), others[0])
    index = torch.tensor(donors)

    def select_donors(tensor: Tensor) -> Tensor:
        return tensor[index.to(tensor.device)]

    shuffled = {layer: with_memory(state, map_tensors(select_donors, without_tail(state))) for layer, state in memory.items()}
    return shuffled, index != torch.arange(num_rows)


def unigram_entropy(dataset: TokenDataset) -> float:
    """Return the entropy of the token frequencies of a split, in nats per token.

    It is the lowest loss that a model without context can reach. Counts targets, weighted by their loss weights: every token of
    a document except its first.
    """
    counts = np.zeros(dataset.vocab_size)
    for document, length in enumerate(dataset.document_lengths):
        for start in range(1, int(length), 1 << 20):
            tokens = dataset.read(document, start, min(1 << 20, int(length) - start))
            weights = dataset.read_weights(document, start, len(tokens)) if dataset.weighted else None
            counts += np.bincount(tokens, weights=weights, minlength=dataset.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def position_bins(result: HeldOutLoss) -> list[tuple[int, int | None]]:
    """Return segment ranges (first, last) that double in width: 0, 1, 2-3, 4-7, ...

    The end of the last range is None if it includes the segments beyond MAX_POSITIONS.
    """
    occupied = np.flatnonzero(result.tokens)
    if len(occupied) == 0:
        return []
    bins: list[tuple[int, int | None]] = [(0, 0)]
    start = 1
    while start <= occupied[-1]:
        bins.append((start, 2 * start - 1))
        start *= 2
    if occupied[-1] == MAX_POSITIONS - 1:
        bins[-1] = (bins[-1][0], None)
    return bins
