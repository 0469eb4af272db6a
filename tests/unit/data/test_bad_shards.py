"""Documents of a bad shard are skipped, and the order of the other documents does not change."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infini_train.data.dataset import TokenDataset, check_dataset, shard_damage
from infini_train.data.manifest import load_manifest
from infini_train.data.preparation import prepare
from infini_train.data.streams import StreamReader
from infini_train.runtime.errors import UserError
from tests.support.corpus import small_run, write_corpus

ROWS, SEGMENT = 4, 16


@pytest.fixture
def run(tmp_path):
    """A run on a corpus of several shards."""
    write_corpus(tmp_path / "text")
    run = small_run(tmp_path)
    run = replace(run, data=replace(run.data, shard_size_mb=0.03))
    prepare(run)
    return run


def documents_read(reader: StreamReader, batches: int) -> list[list[int]]:
    """Return the tokens of each segment that each row reads, over `batches` batches of one segment."""
    rows: list[list[list[int]]] = [[] for _ in reader.rows]
    for _ in range(batches):
        batch = reader.next(1)
        for row, tokens in zip(rows, batch.tokens.tolist(), strict=True):
            row.append(tokens)
    return rows


def segments_of(dataset: TokenDataset, documents: np.ndarray) -> list[list[int]]:
    found = []
    for document in documents:
        tokens = dataset.read(int(document), 0, int(dataset.document_lengths[document])).tolist()[:-1]
        found += [(tokens[i : i + SEGMENT] + [0] * SEGMENT)[:SEGMENT] for i in range(0, len(tokens), SEGMENT)]
    return found


def test_rows_skip_only_documents_of_the_bad_shard(run):
    path = Path(run.data.path)
    whole = TokenDataset(path, "train")
    bad = whole._files[1].name
    lost = np.flatnonzero(whole._shard == 1)
    assert len(whole._files) >= 3 and len(lost) >= 3
    os.unlink(path / bad)
    damaged = TokenDataset(path, "train", frozenset([bad]))
    assert np.flatnonzero(~damaged.available).tolist() == lost.tolist()
    order = StreamReader(damaged, range(ROWS), ROWS, SEGMENT, seed=7)._order(0)
    assert sorted(order.tolist()) == list(range(whole.num_documents)), "the order includes unavailable documents"
    together = documents_read(StreamReader(damaged, range(ROWS), ROWS, SEGMENT, seed=7), 60)
    for row in range(ROWS):
        expected = segments_of(damaged, [d for d in order[row::ROWS] if damaged.available[d]])
        count = min(60, len(expected))
        assert count > 10
        assert together[row][:count] == expected[:count]
        alone = documents_read(StreamReader(damaged, range(row, row + 1), ROWS, SEGMENT, seed=7), 60)
        assert alone[0] == together[row], "the segments of a row depend on the other rows of the reader"


def test_position_inside_unavailable_document_moves_to_the_next(run):
    path = Path(run.data.path)
    whole = TokenDataset(path, "train")
    reader = StreamReader(whole, range(ROWS), ROWS, SEGMENT, seed=7)
    document = int(reader._order(0)[0])
    assert whole.document_lengths[document] > 2 * SEGMENT
    reader.next(1)
    bad = whole._files[whole._shard[document]].name
    other = StreamReader(TokenDataset(path, "train", frozenset([bad])), range(ROWS), ROWS, SEGMENT, seed=7)
    other.load_state(reader.state())
    assert other.state()[0, 1] > 0 and other.state()[0, 2] == 0
    assert bool(other.next(1).reset[0, 0]), "the memory of the unavailable document is not reset"


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove"])
def test_shard_damage_is_described(run, harm):
    path = Path(run.data.path)
    shard = load_manifest(path).splits["train"].shards[1]
    file = path / shard.file
    assert shard_damage(path, shard, checksum=True) is None
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        words = "has another checksum"
        assert shard_damage(path, shard, checksum=False) is None
    elif harm == "shorten":
        file.write_bytes(data[:-1])
        words = f"has {len(data) - 1} bytes where dataset.json says {len(data)}"
    else:
        file.unlink()
        words = "is missing"
    assert f"{file} {words}" in shard_damage(path, shard, checksum=True)
    if harm != "flip":
        with pytest.raises(UserError, match=words):
            check_dataset(run)
        check_dataset(replace(run, data=replace(run.data, on_bad_shard="skip")))


def test_dataset_without_readable_documents_is_refused(run):
    whole = TokenDataset(Path(run.data.path), "train")
    dataset = TokenDataset(Path(run.data.path), "train", frozenset(file.name for file in whole._files))
    with pytest.raises(UserError, match="holds no document"):
        StreamReader(dataset, range(ROWS), ROWS, SEGMENT, seed=7)
