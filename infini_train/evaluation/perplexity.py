"""Held-out loss by position in the document: with memory as it is, emptied at every segment, and of another row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from infini_train.attention import map_parts, with_memory, without_tail
from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import StreamBatch, StreamReader
from infini_train.errors import UserError
from infini_train.model.micro_batch import Memory
from infini_train.parallel.context import context_share
from infini_train.parallel.layout import Layout, all_reduce_sum, raise_everywhere
from infini_train.parallel.pipeline import SegmentPipeline

MAX_POSITIONS = 4096
"""Segments of a document told apart; later ones count with the last."""
Treatment = Literal["kept", "emptied", "shuffled"]
"""Of the memory. kept: as in training; emptied: reset at every segment; shuffled: each row reads the memory that another row
has written so far, of the same age in kind but of another document, and its own is carried on unread."""


@dataclass
class HeldOutLoss:
    """By segment number in the document, over all processes: token losses summed by weight, the weights, and tokens.

    In ordinary data every weight is 1.
    """

    loss_sum: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    own_loss_sum: np.ndarray | None = None
    """Where memory is shuffled: of the same tokens, each row reading its own."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self._mean(self.loss_sum)

    @property
    def own_loss(self) -> float:
        """Of `own_loss_sum`."""
        assert self.own_loss_sum is not None
        return self._mean(self.own_loss_sum)

    def _mean(self, loss_sum: np.ndarray) -> float:
        return float(loss_sum.sum() / (self.weights.sum() or 1.0))


def _batches(run: RunConfig, layout: Layout, dataset: TokenDataset, limit: int | None) -> Iterator[StreamBatch]:
    """Every held-out document once, the longest first; rows that have ended stay as padding until all processes are done."""
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
        # Other processes may still read: their collectives need this one's forward.
        batch = batch if batch is not None else _padding(len(rows), num_segments, run.model.segment_length)
        yield context_share(batch, layout)
        count += 1


def _padding(rows: int, num_segments: int, segment_length: int) -> StreamBatch:
    """A micro-batch without a single valid token."""
    tokens = torch.zeros(rows, num_segments * segment_length, dtype=torch.int64)
    segments = torch.zeros(rows, num_segments, dtype=torch.int64)
    return StreamBatch(
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
    """Sums this process's token losses by segment of the document."""

    def __init__(self, segment_length: int, counts: bool) -> None:
        """Args: counts: whether this process adds, so that of those with the same losses one does."""
        self.segment_length, self.counts = segment_length, counts
        self.sums = torch.zeros(3, MAX_POSITIONS, dtype=torch.float64)

    def add(self, batch: StreamBatch, losses: Tensor, rows: Tensor | None = None) -> None:
        """Args: losses: [B, T] nats; rows: [B] bool, those that count; None is all."""
        if not self.counts:
            return
        positions = batch.segment_index.clamp(max=MAX_POSITIONS - 1).repeat_interleave(self.segment_length, dim=1).flatten()
        mask = batch.loss_mask.double()
        if rows is not None:
            mask = mask * rows[:, None]
        for sums, values in zip(self.sums, (losses.cpu().double() * mask, mask, (mask > 0).double()), strict=True):
            sums.index_add_(0, positions, values.flatten())

    def total(self) -> HeldOutLoss:
        """Over all processes."""
        return HeldOutLoss(*np.array(all_reduce_sum(self.sums.flatten().tolist())).reshape(3, MAX_POSITIONS))


def shuffled_run(run: RunConfig, layout: Layout) -> RunConfig:
    """The run whose pipeline measures with shuffled memory: in the smallest micro-batches: inside one a row reads its own
    memory."""
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
    """Loss over the held-out split; a collective over all processes.

    Args:
        run: whose pipeline this is; for shuffled memory that of `shuffled_run`.
        memory: what is done to it. With shuffled memory only tokens count for which another row of this process had one.
        limit: micro-batches of every row to read, from the longest documents; None reads every document once.
        on_batch: called with the number of micro-batches done, to show progress.
        dataset: the held-out split, if it is open already.
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
        # With context parallelism, which only `infini` and `local` know, a process has a part of the segments.
        reading = batch.lengths[:, -1] > 0 if layout.cp_size == 1 else None
        if on_batch is not None:
            on_batch(count)
    total = by_position.total()
    return replace(total, own_loss_sum=own.total().loss_sum) if memory == "shuffled" else total


def memory_of_other_rows(memory: Memory, num_rows: int, reading: Tensor | None = None) -> tuple[Memory, Tensor]:
    """Each row's memory replaced by that of the next row that has written any. Tails of convolutions are no memory, and stay.

    Args:
        reading: [num_rows] bool, rows whose documents have not ended: caches and memory tokens take in padding too. None where
            a memory of zeros tells that.

    Returns:
        The memory, and [num_rows] bool: rows for which there was such a row. The others keep their own.
    """
    if not memory:
        return {}, torch.zeros(num_rows, dtype=torch.bool)
    # Every layer of every stage and tensor rank has written in the same rows: σ(K) is positive, and a key is not zero.
    parts = without_tail(next(iter(memory.values())))
    written = torch.stack([part.reshape(len(part), -1).ne(0).any(dim=1) for part in parts]).any(dim=0).cpu()
    if reading is not None:
        written &= reading
    filled = [row for row in range(num_rows) if written[row]]
    donors = list(range(num_rows))
    for row in range(num_rows):
        others = [other for other in filled if other != row]
        if others:
            donors[row] = next((other for other in others if other > row), others[0])
    index = torch.tensor(donors)

    def taken(part: Tensor) -> Tensor:
        return part[index.to(part.device)]

    shuffled = {layer: with_memory(state, map_parts(taken, without_tail(state))) for layer, state in memory.items()}
    return shuffled, index != torch.arange(num_rows)


def unigram_entropy(dataset: TokenDataset) -> float:
    """Entropy of the token frequencies of a split, in nats per token: what a model without any context reaches at best.

    Counts targets, by their loss weights: every token of a document but its first.
    """
    counts = np.zeros(dataset.vocab_size)
    for document, length in enumerate(dataset.document_lengths):
        for start in range(1, int(length), 1 << 20):
            part = dataset.read(document, start, min(1 << 20, int(length) - start))
            weights = dataset.read_weights(document, start, len(part)) if dataset.weighted else None
            counts += np.bincount(part, weights=weights, minlength=dataset.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def position_bins(result: HeldOutLoss) -> list[tuple[int, int | None]]:
    """Segment ranges [first, last] that double in width: 0, 1, 2-3, 4-7, ...

    The last has no end (None) where it holds the segments that are not told apart any more.
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
