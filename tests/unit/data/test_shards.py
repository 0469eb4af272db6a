"""Shards, index and manifest: reading back with TokenDataset and plain webdataset, and errors that name the damage."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from infini_train.config import DataConfig, RunConfig
from infini_train.data import dataset as dataset_module
from infini_train.data.atomic_folder import atomic_folder
from infini_train.data.dataset import TokenDataset, check_dataset, shard_damage
from infini_train.data.documents import Document
from infini_train.data.manifest import load_manifest, token_format
from infini_train.data.shards import text_hash_fraction, write_shards
from infini_train.runtime.errors import UserError
from infini_train.runtime.retries import RETRY_SECONDS
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

DOCUMENTS = [Document(f"document {i}: " + f"word{i} and more \u2581\n" * (i * 7 % 40), f"d{i}.txt") for i in range(40)]
SHARD_MB = 0.04


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([d.text for d in DOCUMENTS], path, 310)
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def written(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    write(folder, tokenizer)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the data folder that a test can damage."""
    return shutil.copytree(written, tmp_path / "data")


def write(
    folder: Path, tokenizer: SentencePieceTokenizer, documents: list[Document] = DOCUMENTS, fraction: float = 0.3
) -> None:
    write_shards(documents, tokenizer, folder, source="test", held_out_fraction=fraction, shard_size_mb=SHARD_MB)


def expected(split: str) -> list[Document]:
    return [d for d in DOCUMENTS if (text_hash_fraction(d.text) < 0.3) == (split == "held_out")]


def configuration(folder: Path, vocab_size: int = 310) -> RunConfig:
    return RunConfig(data=DataConfig(path=str(folder), vocab_size=vocab_size))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_documents_round_trip(written: Path, tokenizer: SentencePieceTokenizer, split: str) -> None:
    dataset = TokenDataset(written, split)
    assert dataset.num_documents == len(expected(split)) > 5
    assert dataset.document_lengths.dtype == np.int64
    assert (dataset.vocab_size, dataset.tokenizer_fingerprint) == (310, tokenizer.fingerprint)
    for number, document in enumerate(expected(split)):
        length = int(dataset.document_lengths[number])
        tokens = dataset.read(number, 0, length)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
        assert dataset.read(number, 3, 4).tolist() == tokens[3:7].tolist()
        assert dataset.read(number, length, 0).tolist() == []


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_plain_webdataset_reads_the_shards(written: Path, tokenizer: SentencePieceTokenizer, split: str) -> None:
    manifest = load_manifest(written)
    urls = [str(written / shard.file) for shard in manifest.splits[split].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(expected(split))
    for sample, document in zip(samples, expected(split), strict=True):
        tokens = np.frombuffer(sample["u16"], dtype="<u2").tolist()
        assert tokenizer.decode(tokens) == document.text
        record = {"source": document.name, "characters": len(document.text), "tokens": len(tokens)}
        assert json.loads(sample["json"]) == record


def test_shard_sizes_and_manifest_totals(written: Path) -> None:
    manifest = load_manifest(written)
    shards = manifest.splits["train"].shards
    assert len(shards) > 3
    assert all(shard.bytes == (written / shard.file).stat().st_size <= SHARD_MB * 1e6 for shard in shards)
    for split, facts in manifest.splits.items():
        assert facts.documents == len(expected(split))
        assert facts.characters == sum(len(d.text) for d in expected(split))
        assert facts.tokens == TokenDataset(written, split).document_lengths.sum()
    record = json.loads((written / "dataset.json").read_text())
    assert (record["format_version"], record["source"], record["token_type"]) == (2, "test", "<u2")


def test_document_larger_than_a_shard_is_not_split(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    book = Document("".join(chr(0x4E00 + i % 5000) for i in range(20_000)), "book")
    write(tmp_path, tokenizer, [*DOCUMENTS, book])
    dataset = TokenDataset(tmp_path, "held_out" if text_hash_fraction(book.text) < 0.3 else "train")
    length = int(dataset.document_lengths.max())
    assert length == 60_002
    number = int(dataset.document_lengths.argmax())
    assert tokenizer.decode(dataset.read(number, 0, length).tolist()) == book.text


def test_the_same_corpus_gives_the_same_bytes(written: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer)
    for path in sorted(tmp_path.glob("*.tar")):
        assert path.read_bytes() == (written / path.name).read_bytes()


def test_split_depends_only_on_the_text(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    doubled = [*reversed(DOCUMENTS), *DOCUMENTS]
    write(tmp_path, tokenizer, doubled)
    splits = {split: {d.text for d in expected(split)} for split in ("train", "held_out")}
    for split, texts in splits.items():
        dataset = TokenDataset(tmp_path, split)
        assert dataset.num_documents == 2 * len(texts)
        found = {tokenizer.decode(dataset.read(i, 0, int(n)).tolist()) for i, n in enumerate(dataset.document_lengths)}
        assert found == texts
    share = np.mean([text_hash_fraction(str(i)) < 0.3 for i in range(2000)])
    assert abs(share - 0.3) < 0.04


def test_empty_split_is_refused_with_a_valid_fraction(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    fractions = sorted(text_hash_fraction(d.text) for d in DOCUMENTS)
    for name, bad in (("held_out", fractions[0] / 2), ("train", (fractions[-1] + 1) / 2)):
        with pytest.raises(UserError, match=rf"data\.held_out_fraction.* {name} split") as caught:
            write(tmp_path, tokenizer, fraction=bad)
        remedy = float(str(caught.value).split("set it to ")[1].split(",")[0])
        write(tmp_path, tokenizer, fraction=remedy)
    with pytest.raises(UserError, match=r"1 document, .*two different documents"):
        write(tmp_path, tokenizer, DOCUMENTS[:1])
    with pytest.raises(UserError, match=r"2 documents of equal text, .*two different documents"):
        write(tmp_path, tokenizer, DOCUMENTS[:1] * 2)


def test_token_format() -> None:
    assert token_format(65536) == ("<u2", "u16")
    assert token_format(65537) == ("<u4", "u32")
    assert np.array([65535]).astype(token_format(65536)[0])[0] == 65535


def test_reading_outside_a_document_is_an_error(written: Path) -> None:
    dataset = TokenDataset(written, "train")
    length = int(dataset.document_lengths[0])
    for document, start, count in ((0, 0, length + 1), (0, -1, 1), (0, 0, -1), (-1, 0, 1), (dataset.num_documents, 0, 1)):
        with pytest.raises(IndexError):
            dataset.read(document, start, count)
    with pytest.raises(ValueError, match="split is 'test'"):
        TokenDataset(written, "test")


def test_only_requested_bytes_are_read(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []
    pread = dataset_module.os.pread

    def spy(descriptor: int, size: int, offset: int) -> bytes:
        requested.append(size)
        return pread(descriptor, min(size, 3), offset)  # a short read, which the caller must continue

    dataset = TokenDataset(written, "train")
    number = int(dataset.document_lengths.argmax())
    whole = dataset.read(number, 0, int(dataset.document_lengths[number]))
    monkeypatch.setattr(dataset_module.os, "pread", spy)
    assert dataset.read(number, 7, 4).tolist() == whole[7:11].tolist()
    assert requested == [8, 5, 2]


def test_open_shards_are_bounded(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MAX_OPEN_SHARDS", 2)
    dataset = TokenDataset(written, "train")
    first = [dataset.read(i, 0, 2).tolist() for i in range(dataset.num_documents)]
    assert len(dataset._open) == 2 < len(dataset._files)
    assert [dataset.read(i, 0, 2).tolist() for i in range(dataset.num_documents)] == first
    one_of = {int(shard): number for number, shard in enumerate(dataset._shard)}
    dataset.close()
    for shard in (0, 1, 0, 2):
        dataset.read(one_of[shard], 0, 1)
    assert set(dataset._open) == {0, 2}, "the least recently used shard is closed"
    dataset.close()
    assert dataset.read(0, 0, 2).tolist() == first[0]


@pytest.mark.parametrize("call", ["pread", "open"])
@pytest.mark.parametrize("failures", [1, len(RETRY_SECONDS), len(RETRY_SECONDS) + 1])
def test_transient_read_errors_are_retried(written, call, failures, monkeypatch, capsys) -> None:
    dataset, left, waited = TokenDataset(written, "train"), [failures], []
    expected, real = TokenDataset(written, "train").read(0, 1, 5), getattr(os, call)

    def away(*arguments: object, **options: object) -> object:
        if left[0] and (call == "pread" or str(arguments[0]).endswith(".tar")):
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, away)
    monkeypatch.setattr(time, "sleep", waited.append)
    if failures > len(RETRY_SECONDS):
        with pytest.raises(UserError, match=r"\.tar cannot be read \(Stale file handle\)"):
            dataset.read(0, 1, 5)
    else:
        assert dataset.read(0, 1, 5).tolist() == expected.tolist()
    assert waited == list(RETRY_SECONDS[:failures])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(waited) and all(".tar cannot be read (Stale file handle); trying again in" in line for line in said)


def test_transient_errors_are_retried_before_a_shard_counts_as_damaged(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, left, real = load_manifest(written).splits["train"].shards[0], [2], Path.open

    def away(path: Path, *arguments: object, **options: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", away)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert shard_damage(written, shard, checksum=True) is None and left == [0]


def test_missing_shard_is_not_retried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TokenDataset(folder, "train")
    for shard in folder.glob("train-*.tar"):
        shard.unlink()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("retry_read waited"))
    with pytest.raises(UserError, match="cannot be opened"):
        dataset.read(0, 1, 5)


def test_open_dataset_does_not_read_a_replaced_folder(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number in range(2):
        with atomic_folder(folder, overwrite=True) as partial:
            write(partial, tokenizer, [Document(f"{number} {d.text}", d.name) for d in DOCUMENTS])
        if number == 0:
            dataset = TokenDataset(folder, "train")
            first = dataset.read(0, 0, 4).tolist()
    last = dataset.num_documents - 1
    assert dataset._shard[last] not in dataset._open
    with pytest.raises(UserError, match=r"data\.path .*data was replaced or moved away while it was read"):
        dataset.read(last, 0, 2)
    assert dataset.read(0, 0, 4).tolist() == first, "an open shard can still be read"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shorten_documents(folder: Path) -> None:
    index = dict(np.load(folder / "train.index.npz"))
    np.savez(folder / "train.index.npz", **index | {"tokens": index["tokens"] - 1})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"data\.path .*data does not exist; run `infini-train prepare --config"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], r"data\.path .*dataset\.json is missing.*prepare"),
    "half a manifest": (lambda f: (f / "dataset.json").write_text('{"format_version": 1'), r"dataset\.json is damaged"),
    "manifest is a list": (lambda f: (f / "dataset.json").write_text("[]"), r"dataset\.json is damaged"),
    "no splits": (lambda f: edit(f / "dataset.json", splits={}), r"dataset\.json is damaged"),
    "unknown key": (lambda f: edit(f / "dataset.json", extra=1), r"dataset\.json is damaged"),
    "wrong type": (lambda f: edit(f / "dataset.json", token_type="<u4"), r"dataset\.json is damaged"),
    "newer version": (lambda f: edit(f / "dataset.json", format_version=9), r"dataset\.json has format_version 9"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), r"tokenizer\.model is missing"),
    "other tokenizer": (lambda f: flip(f / "tokenizer.model", 99), r"tokenizer\.model is not the tokenizer"),
    "no shard": (lambda f: (f / "train-000001.tar").unlink(), r"train-000001\.tar is missing"),
    "short shard": (lambda f: (f / "held_out-000000.tar").write_bytes(b"x"), r"held_out-000000\.tar has 1 bytes"),
    "no index": (lambda f: (f / "held_out.index.npz").unlink(), r"held_out\.index\.npz is missing or damaged"),
    "flipped index": (lambda f: flip(f / "train.index.npz", 300), r"train\.index\.npz is missing or damaged"),
    "shorter documents": (shorten_documents, r"train\.index\.npz does not match"),
    "other index": (
        lambda f: shutil.copyfile(f / "held_out.index.npz", f / "train.index.npz"),
        r"train\.index\.npz does not match",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_dataset_names_the_damage(folder: Path, damage: str) -> None:
    check_dataset(configuration(folder))
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_dataset(configuration(folder))
    assert "prepare" in str(caught.value) and "\n" not in str(caught.value)


def test_check_dataset_refuses_another_vocabulary(written: Path) -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size is 999, .* with 310; set data\.vocab_size to 310"):
        check_dataset(configuration(written, vocab_size=999))


def test_tokens_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    dataset = TokenDataset(folder, "train")
    data = bytearray((folder / "train-000000.tar").read_bytes())
    data[int(dataset._offset[0]) + 3] = 0xFF  # high byte of the second token
    (folder / "train-000000.tar").write_bytes(data)
    assert len(dataset.read(0, 0, 1)) == 1
    with pytest.raises(UserError, match=r"train-000000\.tar is damaged in document 0"):
        dataset.read(0, 0, 2)


def test_check_dataset_does_not_import_torch(written: Path) -> None:
    program = (
        "import sys; from infini_train.config import *; from infini_train.data.dataset import check_dataset\n"
        f"check_dataset(RunConfig(data=DataConfig(path={str(written)!r}, vocab_size=310)))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
