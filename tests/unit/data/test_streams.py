"""Streams: every document is read once per epoch, targets stay inside documents, and rows do not depend on each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import Batch, StreamReader
from infini_train.runtime.errors import UserError

LENGTHS = [2, 3, 4, 5, 6, 9, 10, 17, 21, 33, 5, 2, 13]
S = 4


class ArrayDataset(TokenDataset):
    """Dataset held in host memory. The token at position p of document d is 1000 (d + 1) + p."""

    def __init__(self, lengths: list[int]) -> None:
        self.path, self.split = Path("memory"), "train"
        self.document_lengths = np.array(lengths, dtype=np.int64)
        self.available = np.ones(len(self.document_lengths), dtype=bool)
        self.vocab_size = 1000 * (len(lengths) + 1)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        assert start >= 0 and count >= 0 and start + count <= self.document_lengths[document]
        return 1000 * (document + 1) + np.arange(start, start + count)


DATASET = ArrayDataset(LENGTHS)


def reader(rows: range = range(3), total_rows: int = 3, **options: object) -> StreamReader:
    settings: dict = {"segment_length": S, "seed": 7} | options
    return StreamReader(settings.pop("dataset", DATASET), rows, total_rows, **settings)


def same(a: Batch | None, b: Batch | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.equal(x, vars(b)[name]) and x.dtype == vars(b)[name].dtype for name, x in vars(a).items())


def row_of(batch: Batch, b: int) -> dict[str, torch.Tensor]:
    return {name: value[b] for name, value in vars(batch).items()}


def documents_of(batches: list[Batch], b: int) -> list[list[int]]:
    """Join a row's segments into documents, and check the properties of each segment."""
    documents: list[list[int]] = []
    places = 0
    for batch in batches:
        row = row_of(batch, b)
        for n, length in enumerate(row["lengths"].tolist()):
            tokens, targets, mask = (row[k][n * S : (n + 1) * S].tolist() for k in ("tokens", "targets", "loss_mask"))
            assert mask == [1.0] * length + [0.0] * (S - length)
            assert tokens[length:] == targets[length:] == [0] * (S - length)
            if length == 0:
                assert row["reset"][n] and row["segment_index"][n] == 0
                continue
            if row["reset"][n]:
                documents.append([tokens[0]])
                places = 0
            assert row["segment_index"][n] == places
            assert tokens[0] == documents[-1][-1], "a segment begins with the last target of the previous segment"
            assert tokens[1:length] == targets[: length - 1]
            documents[-1] += targets[:length]
            places += 1
    return documents


def read_all(stream: StreamReader, num_segments: int) -> list[Batch]:
    batches = []
    while (batch := stream.next(num_segments)) is not None:
        batches.append(batch)
        assert len(batches) < 1000
    return batches


@pytest.mark.parametrize("num_segments", [1, 2, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_is_read_once_per_epoch(num_segments: int, shuffle: bool) -> None:
    batches = read_all(reader(num_epochs=1, shuffle=shuffle), num_segments)
    documents = [document for b in range(3) for document in documents_of(batches, b)]
    whole = [DATASET.read(d, 0, n).tolist() for d, n in enumerate(LENGTHS)]
    assert sorted(documents) == sorted(whole)
    assert sum(batch.num_valid for batch in batches) == sum(LENGTHS) - len(LENGTHS)
    assert sum(batch.tokens.numel() for batch in batches) == len(batches) * 3 * num_segments * S


def test_unshuffled_rows_take_every_rth_document() -> None:
    batches = read_all(reader(num_epochs=1, shuffle=False), 3)
    for b in range(3):
        assert [d[0] // 1000 - 1 for d in documents_of(batches, b)] == list(range(len(LENGTHS)))[b::3]


def test_epochs_differ_in_order_and_rows_drift() -> None:
    batches = read_all(reader(num_epochs=3), 2)
    orders = []
    for epoch in range(3):
        order: list[int] = []
        for b in range(3):
            share = len(range(b, len(LENGTHS), 3))
            documents = [d[0] // 1000 - 1 for d in documents_of(batches, b)]
            order += documents[epoch * share : (epoch + 1) * share]
        assert sorted(order) == list(range(len(LENGTHS)))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = [d[0] // 1000 - 1 for d in documents_of(read_all(reader(num_epochs=1, seed=8), 2), 0)]
    assert other != orders[0][: len(other)]
    drifting = reader()
    epochs = set()
    for _ in range(200):
        drifting.next(1)
        epochs.add(len(set(drifting.state()[:, 0].tolist())))
    assert max(epochs) > 1
    assert len(drifting._orders) <= 4, "orders of past epochs are dropped"


def test_document_order_is_stable_between_numpy_versions() -> None:
    """A run resumed with another numpy version reads the same documents, because numpy keeps the stream of PCG64 stable.

    The order is np.argsort(np.random.PCG64(np.random.SeedSequence([7, 0])).random_raw(13), kind="stable").
    """
    frozen = [6, 3, 12, 11, 4, 10, 9, 0, 2, 8, 7, 5, 1]
    batches = read_all(reader(range(1), 1, num_epochs=1), 1)
    assert [d[0] // 1000 - 1 for d in documents_of(batches, 0)] == frozen


def test_shapes_and_types() -> None:
    batch = reader(range(1, 3)).next(5)
    assert batch is not None
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in vars(batch).items()}
    assert kinds == {
        "tokens": ((2, 5 * S), torch.int64),
        "targets": ((2, 5 * S), torch.int64),
        "loss_mask": ((2, 5 * S), torch.float32),
        "lengths": ((2, 5), torch.int64),
        "reset": ((2, 5), torch.bool),
        "segment_index": ((2, 5), torch.int64),
        "draws": ((2, 5, 2), torch.float64),
        "repeats": ((2, 5), torch.int64),
    }
    assert batch.tokens.numel() == 40 and batch.num_valid == batch.loss_mask.sum()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=6, max_size=12).filter(lambda x: sum(n >= 2 for n in x) >= 6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**63),
)
def test_batches_do_not_depend_on_resume_and_partition(lengths: list[int], sizes: list[int], cut: int, seed: int) -> None:
    dataset = ArrayDataset(lengths)
    whole = reader(range(6), 6, dataset=dataset, seed=seed)
    first, second = (reader(rows, 6, dataset=dataset, seed=seed) for rows in (range(2), range(2, 6)))
    for step, size in enumerate(sizes):
        if step == cut:
            # From here on, the readers hold other rows, as after a resume in another layout.
            state = torch.cat([first.state(), second.state()])
            assert torch.equal(state, whole.state())
            first, second = (reader(rows, 6, dataset=dataset, seed=seed) for rows in (range(5), range(5, 6)))
            first.load_state(state[:5])
            second.load_state(state[5:])
        expected, *batches = (r.next(size) for r in (whole, first, second))
        joined = {name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(expected)}
        assert same(expected, Batch(**joined))


def test_batches_do_not_depend_on_num_segments() -> None:
    small, big = reader(), reader()
    batches = [small.next(1) for _ in range(12)]
    whole = big.next(12)
    assert whole is not None
    for name, value in vars(whole).items():
        assert torch.equal(torch.cat([vars(batch)[name] for batch in batches], dim=1), value), name
    assert torch.equal(small.state(), big.state())


def test_state_is_a_copy_of_the_position() -> None:
    stream = reader(range(1), 1, dataset=ArrayDataset([10, 4]), shuffle=False)
    before = stream.state()
    stream.next(2)
    assert before.tolist() == [[0, 0, 0]] and before.dtype == torch.int64
    assert stream.state().tolist() == [[0, 0, 8]]
    stream.next(1)
    assert stream.state().tolist() == [[0, 1, 0]]
    stream.next(1)
    assert stream.state().tolist() == [[1, 0, 0]]


def test_rows_end_and_stay_ended() -> None:
    # Row 0 holds 9 positions, row 1 holds 1, rows 2 and 3 get no document at all.
    stream = reader(range(4), 4, dataset=ArrayDataset([10, 2, 0, 1]), shuffle=False, num_epochs=1)
    batch = stream.next(2)
    assert batch is not None
    assert batch.lengths.tolist() == [[4, 4], [1, 0], [0, 0], [0, 0]]
    assert batch.reset.tolist() == [[True, False], [True, True], [True, True], [True, True]]
    assert batch.segment_index.tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    resumed = reader(range(4), 4, dataset=ArrayDataset([10, 2, 0, 1]), shuffle=False, num_epochs=1)
    resumed.load_state(stream.state())
    for again in (stream, resumed):
        last = again.next(2)
        assert last is not None and last.lengths.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
        assert again.next(2) is None and again.next(1) is None
        assert again.state().tolist() == [[1, 0, 0]] * 4


def test_impossible_readers_are_refused() -> None:
    with pytest.raises(UserError, match=r"memory \(train\) holds no document of two tokens"):
        reader(dataset=ArrayDataset([1, 0]))
    with pytest.raises(UserError, match=r"training\.rows is 3, .* only 2 documents.* at most 2"):
        reader(range(1), 3, dataset=ArrayDataset([5, 1, 5]))
    with pytest.raises(UserError, match=r"training\.seed is -1"):
        reader(seed=-1)
    for rows in (range(0), range(2, 4), range(-1, 1)):
        with pytest.raises(ValueError, match="rows is range"):
            reader(rows)
    with pytest.raises(ValueError, match="segment_length 0"):
        reader(segment_length=0)
    with pytest.raises(ValueError, match="num_epochs 0"):
        reader(num_epochs=0)
    with pytest.raises(ValueError, match="num_segments is 0"):
        reader().next(0)


@pytest.mark.parametrize("bad", [[-1, 0, 0], [0, 5, 0], [0, -1, 0], [0, 0, 3], [0, 0, 4000], [0, 0, -4]])
def test_invalid_position_is_refused(bad: list[int]) -> None:
    stream = reader()
    stream.next(3)
    before = stream.state()
    with pytest.raises(UserError, match=r"row 1 cannot continue.*training\.rows"):
        stream.load_state(torch.tensor([[0, 0, 0], bad, [0, 0, 0]]))
    assert torch.equal(stream.state(), before)


def test_state_of_wrong_shape_or_type_is_refused() -> None:
    for state in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="state is torch"):
            reader().load_state(state)
    ended = reader(num_epochs=1)
    with pytest.raises(UserError, match="cannot continue"):
        ended.load_state(torch.tensor([[2, 0, 0]] * 3))
    ended.load_state(torch.tensor([[1, 0, 0]] * 3))
    assert ended.next(1) is None


def test_longest_first_reads_by_decreasing_length():
    lengths = lengths_read(reader(range(1), 1, shuffle=False, num_epochs=1, longest_first=True))
    assert lengths == sorted((length - 1 for length in LENGTHS), reverse=True)


def lengths_read(source: StreamReader) -> list[int]:
    """Return the number of targets of each document of a single row, in reading order."""
    lengths: list[int] = []
    while (batch := source.next(1)) is not None:
        if bool(batch.reset[0, 0]):
            lengths.append(0)
        lengths[-1] += int(batch.lengths[0, 0])
    return lengths


def test_curriculum_sorts_only_a_fraction_of_the_first_epoch() -> None:
    def epochs(**options: float) -> tuple[list[int], list[int]]:
        both = lengths_read(reader(range(1), 1, num_epochs=2, **options))
        return both[: len(both) // 2], both[len(both) // 2 :]

    plain, half, whole = epochs(), epochs(length_curriculum=0.5), epochs(length_curriculum=1.0)
    assert plain[1] == half[1] == whole[1]
    assert whole[0] == sorted(plain[0]) != plain[0]
    middle = round(len(plain[0]) / 2)
    assert half[0] == sorted(plain[0][:middle]) + plain[0][middle:] != plain[0]


def test_random_numbers_differ_between_segments() -> None:
    """No two segments have equal draws. The tests above compare the draws like all tensors of a batch."""
    whole = reader().next(12)
    assert whole is not None
    assert float(whole.draws.min()) >= 0 and float(whole.draws.max()) < 1
    used = whole.draws[whole.lengths > 0]
    assert len(used.unique()) == used.numel()
