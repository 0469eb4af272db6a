"""Held-out loss, by position in the document, with memory and with the memory emptied at every segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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


@dataclass
class HeldOutLoss:
    """By segment number in the document, over all processes: token losses summed by weight, the weights, and tokens.

    In ordinary data every weight is 1.
    """

    loss_sum: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.loss_sum.sum() / (self.weights.sum() or 1.0))


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


def held_out_loss(
    run: RunConfig,
    layout: Layout,
    pipeline: SegmentPipeline,
    *,
    empty_memory: bool = False,
    limit: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """Loss over the held-out split; a collective over all processes.

    Args:
        empty_memory: reset the memory at every segment.
        limit: micro-batches of every row to read, from the longest documents; None reads every document once.
        on_batch: called with the number of micro-batches done, to show progress.
    """
    dataset = TokenDataset(Path(run.data.path), "held_out")
    loss_sum = torch.zeros(MAX_POSITIONS, dtype=torch.float64)
    weights = torch.zeros(MAX_POSITIONS, dtype=torch.float64)
    tokens = torch.zeros(MAX_POSITIONS, dtype=torch.float64)

    def add(batch: StreamBatch, losses: Tensor) -> None:
        if layout.tp_rank != 0:
            return
        positions = batch.segment_index.clamp(max=MAX_POSITIONS - 1).repeat_interleave(run.model.segment_length, dim=1)
        mask = batch.loss_mask.double()
        loss_sum.index_add_(0, positions.flatten(), (losses.cpu().double() * mask).flatten())
        weights.index_add_(0, positions.flatten(), mask.flatten())
        tokens.index_add_(0, positions.flatten(), (mask > 0).double().flatten())

    memory: Memory = {}
    for count, batch in enumerate(_batches(run, layout, dataset, limit), start=1):
        memory = pipeline.evaluate([batch], memory, add, empty_memory=empty_memory)
        if on_batch is not None:
            on_batch(count)
    total = np.array(all_reduce_sum([*loss_sum.tolist(), *weights.tolist(), *tokens.tolist()]))
    return HeldOutLoss(*total.reshape(3, MAX_POSITIONS))


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


def position_bins(result: HeldOutLoss) -> list[tuple[int, int]]:
    """Segment ranges [first, last] that double in width: 0, 1, 2-3, 4-7, ..."""
    occupied = np.flatnonzero(result.tokens)
    if len(occupied) == 0:
        return []
    bins = [(0, 0)]
    start = 1
    while start <= occupied[-1]:
        bins.append((start, 2 * start - 1))
        start *= 2
    return bins
