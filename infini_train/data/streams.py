"""Streams: each row of the global batch reads its own documents, one after another.

Shapes: B rows of this reader, N segments, S segment_length, T = N S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from infini_train.data.dataset import TokenDataset
from infini_train.runtime.errors import UserError


@dataclass
class Batch:
    """The next N segments of each row. A segment holds tokens of one document, then padding (token 0)."""

    tokens: torch.Tensor  # [B, T] int64
    targets: torch.Tensor  # [B, T] int64, the next token at each position
    loss_mask: torch.Tensor  # [B, T] float32, weight of the target, 1 in ordinary data; 0 at positions without a target
    lengths: torch.Tensor  # [B, N] int64, number of valid tokens; they are at the start of the segment
    reset: torch.Tensor  # [B, N] bool, whether a document begins in this segment; also true in a row that has ended
    segment_index: torch.Tensor  # [B, N] int64, number of the segment within its document
    draws: torch.Tensor  # [B, N, 2] float64, random numbers in [0, 1) of the segment, equal in every layout
    repeats: torch.Tensor  # [B, N] int64, times that the segment's memory update is applied; training can set more than 1

    @property
    def num_valid(self) -> int:
        """Number of positions with a target."""
        return int(self.lengths.sum())

    @property
    def loss_weight(self) -> float:
        """Sum of the targets' weights; equal to num_valid in ordinary data."""
        return float(self.loss_mask.sum(dtype=torch.float64))


class StreamReader:
    """Reader of some rows of the global batch.

    In epoch e, row r of R reads the documents `order_e[r::R]`. order_e is a permutation of all documents with a target, seeded
    by (seed, e). So all rows together read every document once per epoch. Each row starts its next epoch independently of the
    other rows. The documents of a row depend only on (dataset, r, R, S, seed, shuffle, curriculum), and not on the other rows
    of the reader.

    A document that is not available is skipped at its position in the order, and the order of the others does not change. So a
    run that continues without a shard reads the same sequence without that shard's documents.

    A document of n tokens gives n - 1 positions, padded to a multiple of S. Documents begin at segment starts, and no target
    is a token of another document.

    Args:
        rows: global numbers of the rows that this reader reads.
        total_rows: R, number of rows of the global batch.
        segment_length: S, in tokens.
        seed: seed of the document order, together with the epoch.
        shuffle: if False, read documents in the order of the dataset, or by length with longest_first.
        num_epochs: number of epochs after which a row ends; None for no end.
        longest_first: with shuffle False, read the longest documents first. All rows then end within the length of one
            document of each other.
        length_curriculum: with shuffle, the fraction of the first epoch's documents that is sorted by length, shortest first.
            It is taken from the start of the epoch's order; the rest of the order does not change.

    Raises:
        ValueError: if rows is empty or not inside 0 .. total_rows - 1.
        UserError: if no document has a target, or if a row would never get a document.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        rows: range,
        total_rows: int,
        segment_length: int,
        seed: int,
        shuffle: bool = True,
        num_epochs: int | None = None,
        longest_first: bool = False,
        length_curriculum: float = 0.0,
    ) -> None:
        if not rows or min(rows) < 0 or max(rows) >= total_rows:
            raise ValueError(f"rows is {rows}; it must name rows among the {total_rows} of the global batch")
        if segment_length < 1 or (num_epochs is not None and num_epochs < 1):
            raise ValueError(f"segment_length {segment_length} and num_epochs {num_epochs} must be positive")
        if seed < 0:
            raise UserError(f"training.seed is {seed}; use 0 or a positive number")
        self.dataset = dataset
        self.rows = rows
        self.total_rows = total_rows
        self.segment_length = segment_length
        self.seed = seed
        self.shuffle = shuffle
        self.num_epochs = num_epochs
        self.length_curriculum = length_curriculum
        self._documents = np.flatnonzero(dataset.document_lengths >= 2)
        if longest_first:
            self._documents = self._documents[np.argsort(-dataset.document_lengths[self._documents], kind="stable")]
        readable = int(dataset.available[self._documents].sum())
        if not readable:
            raise UserError(f"{dataset.path} ({dataset.split}) holds no document of two tokens; prepare longer documents")
        if num_epochs is None and readable < total_rows:
            raise UserError(
                f"training.rows is {total_rows}, but the {dataset.split} split of {dataset.path} has only "
                f"{readable} documents, so some rows would stay empty; set training.rows to at most "
                f"{readable}, or prepare more documents"
            )
        self._orders: dict[int, np.ndarray] = {}
        # Per row: epoch, index into the row's documents of that epoch, offset in tokens within that document.
        self._position = np.zeros((len(rows), 3), dtype=np.int64)
        for b in range(len(rows)):
            if not self._documents_per_epoch(b):  # possible only with num_epochs: a row without documents has ended
                self._position[b, 0] = num_epochs or 0
            self._skip_unavailable(b)

    def next(self, num_segments: int) -> Batch | None:
        """Return the next segments of every row, or None if every row has ended.

        Args:
            num_segments: N, segments to read per row.
        """
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be positive")
        if all(self._ended(b) for b in range(len(self.rows))):
            return None
        B, N, S = len(self.rows), num_segments, self.segment_length
        tokens = np.zeros((B, N * S), dtype=np.int64)
        targets = np.zeros((B, N * S), dtype=np.int64)
        weights = np.ones((B, N * S), dtype=np.float32)
        lengths = np.zeros((B, N), dtype=np.int64)
        reset = np.ones((B, N), dtype=bool)
        segment_index = np.zeros((B, N), dtype=np.int64)
        draws = np.zeros((B, N, 2))
        for b in range(B):
            filled = 0
            while filled < N and not self._ended(b):
                document, offset, positions = self._current(b)
                segments = min(N - filled, -(-(positions - offset) // S))
                count = min(segments * S, positions - offset)
                ids = self.dataset.read(document, offset, count + 1)
                tokens[b, filled * S : filled * S + count] = ids[:-1]
                targets[b, filled * S : filled * S + count] = ids[1:]
                if self.dataset.weighted:
                    weights[b, filled * S : filled * S + count] = self.dataset.read_weights(document, offset + 1, count)
                place = np.s_[b, filled : filled + segments]
                lengths[place] = np.minimum(count - S * np.arange(segments), S)
                segment_index[place] = offset // S + np.arange(segments)
                reset[place] = segment_index[place] == 0
                draws[place] = self._draws(b, document, offset // S, segments)
                filled += segments
                self._advance(b, count)
        has_target = np.arange(S) < lengths[:, :, None]  # [B, N, S]
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            loss_mask=torch.from_numpy(has_target.reshape(B, N * S).astype(np.float32) * weights),
            lengths=torch.from_numpy(lengths),
            reset=torch.from_numpy(reset),
            segment_index=torch.from_numpy(segment_index),
            draws=torch.from_numpy(draws),
            repeats=torch.ones(B, N, dtype=torch.int64),
        )

    def _draws(self, b: int, document: int, first_segment: int, segments: int) -> np.ndarray:
        """Return random numbers [segments, 2] of a document's segments in the row's epoch."""
        generator = np.random.PCG64(np.random.SeedSequence([self.seed, int(self._position[b, 0]), document]))
        generator.advance(2 * first_segment)
        return (generator.random_raw(2 * segments) >> np.uint64(11)).reshape(segments, 2) / 2.0**53

    def state(self) -> torch.Tensor:
        """Return the position of every row, [B, 3] int64: epoch, index into the row's documents, token offset."""
        return torch.from_numpy(self._position.copy())

    def load_state(self, state: torch.Tensor) -> None:
        """Continue from the `state()` of readers with the same settings. Their states can be split and joined by row.

        Raises:
            ValueError: if the shape or type is wrong.
            UserError: if a position does not exist in this dataset.
        """
        if tuple(state.shape) != self._position.shape or state.dtype != torch.int64:
            raise ValueError(f"state is {state.dtype} {list(state.shape)}; it must be torch.int64 {list(self._position.shape)}")
        before = self._position
        self._position = state.cpu().numpy().copy()
        for b, row in enumerate(self.rows):
            if not self._position_exists(b):
                found = self._position[b].tolist()
                self._position = before
                raise UserError(
                    f"row {row} cannot continue at epoch, document, token {found}: {self.dataset.path} ({self.dataset.split}) "
                    "has no such segment; resume with the data, training.rows and model.segment_length of the run that saved it"
                )
        for b in range(len(self.rows)):
            self._skip_unavailable(b)

    def _position_exists(self, b: int) -> bool:
        epoch, index, offset = self._position[b].tolist()
        if self.num_epochs is not None and epoch >= self.num_epochs:
            return (epoch, index, offset) == (self.num_epochs, 0, 0)
        if epoch < 0 or not 0 <= index < self._documents_per_epoch(b):
            return False
        return 0 <= offset < self._current(b)[2] and offset % self.segment_length == 0

    def _ended(self, b: int) -> bool:
        return self.num_epochs is not None and self._position[b, 0] >= self.num_epochs

    def _current(self, b: int) -> tuple[int, int, int]:
        """Return (document, offset, number of positions of the document) at the row's position."""
        epoch, index, offset = self._position[b].tolist()
        document = int(self._order(epoch)[self.rows[b] + index * self.total_rows])
        return document, offset, int(self.dataset.document_lengths[document]) - 1

    def _advance(self, b: int, count: int) -> None:
        _, offset, positions = self._current(b)
        self._position[b, 2] += count
        if offset + count == positions:
            self._next_document(b)
            self._skip_unavailable(b)

    def _next_document(self, b: int) -> None:
        self._position[b, 1:] = self._position[b, 1] + 1, 0
        if self._position[b, 1] == self._documents_per_epoch(b):
            self._position[b] = self._position[b, 0] + 1, 0, 0

    def _skip_unavailable(self, b: int) -> None:
        while not self._ended(b) and not self.dataset.available[self._current(b)[0]]:
            self._next_document(b)

    def _documents_per_epoch(self, b: int) -> int:
        """Return the number of documents that the row reads in each epoch."""
        return max(0, -(-(len(self._documents) - self.rows[b]) // self.total_rows))

    def _order(self, epoch: int) -> np.ndarray:
        """Return all documents in the order of an epoch."""
        if not self.shuffle:
            return self._documents
        if epoch not in self._orders:
            # Drop the orders of epochs that no row reads now.
            reading = set(self._position[:, 0].tolist())
            self._orders = {e: order for e, order in self._orders.items() if e in reading}
            # Sort raw bits: numpy keeps the stream of a bit generator stable between versions, but not permutation().
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self._documents))
            order = self._documents[np.argsort(bits, kind="stable")]
            if epoch == 0:
                first = order[: round(self.length_curriculum * len(order))]
                first[:] = first[np.argsort(self.dataset.document_lengths[first], kind="stable")]
            self._orders[epoch] = order
        return self._orders[epoch]
