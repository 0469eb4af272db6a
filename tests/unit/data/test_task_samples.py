"""Shards of a task: samples as documents with loss weights, and unchanged shards for ordinary text."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infini_train.cli.main import main
from infini_train.cli.parser import expand_aliases
from infini_train.config import DataConfig, RunConfig, TaskConfig
from infini_train.data.dataset import TokenDataset, check_dataset
from infini_train.data.manifest import load_manifest
from infini_train.data.preparation import prepare
from infini_train.data.streams import StreamReader
from infini_train.data.task_samples import task_length
from infini_train.measurement.perplexity import unigram_entropy
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.corpus import small_run, write_corpus


def task_run(folder: Path, **task: object) -> RunConfig:
    settings: dict = {"kind": "passkey", "samples": 40, "held_out_samples": 6, "min_tokens": 150, "max_tokens": 300} | task
    data = DataConfig(path=str(folder / "data"), vocab_size=384)
    return replace(small_run(folder), data=data, task=TaskConfig(**settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = task_run(tmp_path_factory.mktemp("task"))
    prepare(run)
    return run


def test_documents_are_samples_with_weights(run: RunConfig) -> None:
    check_dataset(run)
    folder = Path(run.data.path)
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    texts: dict[str, set[str]] = {}
    for split, count in (("train", 40), ("held_out", 6)):
        dataset = TokenDataset(folder, split)
        assert dataset.weighted and dataset.num_documents == count
        lengths = dataset.document_lengths - 1
        assert 150 <= lengths.min() < lengths.max() <= 300
        texts[split] = set()
        for number in range(count):
            size = int(dataset.document_lengths[number])
            tokens, weights = dataset.read(number, 0, size), dataset.read_weights(number, 0, size)
            assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
            assert weights.dtype == np.float32
            expected = np.full(size, np.float32(0.2))
            expected[-6:-1] = 1.0
            assert np.array_equal(weights, expected)
            assert np.array_equal(dataset.read_weights(number, size - 9, 7), expected[-9:-2])
            text = tokenizer.decode(tokens.tolist())
            assert f"The pass key is {tokenizer.decode(tokens[-6:-1].tolist())}. Remember it." in text
            texts[split].add(text)
    assert len(texts["train"]) == 40 and not texts["train"] & texts["held_out"]


@pytest.mark.parametrize(
    ("distribution", "octaves"),
    [("uniform", [1 / 7, 2 / 7, 4 / 7]), ("log_uniform", [1 / 3, 1 / 3, 1 / 3]), ("equal_tokens", [4 / 7, 2 / 7, 1 / 7])],
)
def test_lengths_follow_the_configured_distribution(distribution: str, octaves: list[float]) -> None:
    task = TaskConfig(min_tokens=256, max_tokens=2048, length_distribution=distribution)  # type: ignore[arg-type]
    lengths = np.array([task_length(task, (number + 0.5) / 7000) for number in range(7000)])
    counts, _ = np.histogram(lengths, bins=[256, 512, 1024, 2049])
    assert counts / 7000 == pytest.approx(octaves, abs=0.002)
    assert (task_length(task, 0.0), task_length(task, 1 - 2**-53)) == (256, 2048)


def test_number_of_facts_varies_between_min_keys_and_keys(tmp_path: Path) -> None:
    """Short texts have as many facts as fit. In long texts every number of facts is about equally frequent."""
    run = task_run(tmp_path, kind="multi_key", keys=3, min_keys=1, questions=3, samples=90, min_tokens=200, max_tokens=600)
    prepare(run)
    dataset = TokenDataset(Path(run.data.path), "train")
    tokenizer = SentencePieceTokenizer(Path(run.data.path) / "tokenizer.model")
    long, short = [], []
    for number in range(90):
        size = int(dataset.document_lengths[number])
        text = tokenizer.decode(dataset.read(number, 0, size).tolist())
        facts = text.count("Remember it.")
        assert 1 <= facts == text.count("What is the pass key of the")
        assert (dataset.read_weights(number, 0, size) == 1).sum() == 5 * facts
        (long if size > 350 else short).append(facts)
    assert len(long) > 40 and min(long.count(facts) for facts in (1, 2, 3)) > 8
    assert np.mean(short) < np.mean(long)


def test_manifest_records_weight_levels_and_task(run: RunConfig) -> None:
    folder = Path(run.data.path)
    record = json.loads((folder / "dataset.json").read_text())
    assert record["weight_levels"] == [float(np.float32(0.2)), 1.0]
    assert record["task"]["kind"] == "passkey" and record["task"]["min_tokens"] == 150 and record["source"] == "repeated"
    with tarfile.open(folder / record["splits"]["train"]["shards"][0]["file"]) as tar:
        names = tar.getnames()
    assert names[:3] == ["0000000000.json", "0000000000.u16", "0000000000.weights.u8"]


def test_loss_mask_holds_the_weights(run: RunConfig) -> None:
    dataset = TokenDataset(Path(run.data.path), "held_out")
    stream = StreamReader(dataset, range(2), 2, 16, seed=0, num_epochs=1)
    heavy = positions = 0
    total = 0.0
    while (batch := stream.next(3)) is not None:
        valid = (torch.arange(16) < batch.lengths[:, :, None]).flatten(1)
        assert torch.equal(batch.loss_mask > 0, valid)
        assert batch.loss_weight == pytest.approx(float(batch.loss_mask.double().sum()), rel=1e-12)
        heavy += int((batch.loss_mask == 1).sum())
        positions += batch.num_valid
        total += batch.loss_weight
    assert heavy == 6 * 5 and positions == int((dataset.document_lengths - 1).sum())
    assert total == pytest.approx(30 + 0.2 * (positions - 30), rel=1e-6)


def test_weights_are_aligned_with_targets(run: RunConfig) -> None:
    dataset = TokenDataset(Path(run.data.path), "train")
    batch = StreamReader(dataset, range(1), 1, 16, seed=0, num_epochs=1, shuffle=False).next(20)
    assert batch is not None
    size = int(dataset.document_lengths[0])
    assert batch.loss_mask[0, : size - 1].tolist() == dataset.read_weights(0, 1, size - 1).tolist()
    answer = batch.targets[0, : size - 1][batch.loss_mask[0, : size - 1] == 1]
    assert answer.tolist() == dataset.read(0, size - 6, 5).tolist()


def test_the_same_configuration_gives_the_same_bytes(run: RunConfig, tmp_path: Path) -> None:
    again = task_run(tmp_path)
    prepare(again)
    other = task_run(tmp_path / "other", seed=1)
    prepare(other)
    digests = [load_manifest(Path(r.data.path)).splits["train"].shards[0].sha256 for r in (run, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_text_filler_keeps_splits_separate(tmp_path: Path) -> None:
    source = tmp_path / "text"
    write_corpus(source, documents=40)
    run = task_run(tmp_path, kind="babi", keys=4, filler="text")
    run = replace(run, data=replace(run.data, source=str(source), vocab_size=600, held_out_fraction=0.3))
    prepare(run)
    tokenizer = SentencePieceTokenizer(Path(run.data.path) / "tokenizer.model")
    lines: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        dataset = TokenDataset(Path(run.data.path), split)
        text = "\n".join(
            tokenizer.decode(dataset.read(n, 0, int(size)).tolist()) for n, size in enumerate(dataset.document_lengths)
        )
        lines[split] = {line for line in text.split("\n") if len(line) > 60}
        assert "Where is " in text
    written = {line for path in source.glob("*.txt") for line in path.read_text().split("\n")}
    assert len(lines["train"] & written) > 3 and lines["held_out"] & written
    assert not lines["train"] & lines["held_out"] & written


def test_ordinary_data_has_no_weights(tmp_path: Path) -> None:
    """Without a task there are no weights and no task keys, and the sum of the loss mask is exactly the number of targets."""
    write_corpus(tmp_path / "text", documents=20)
    run = small_run(tmp_path)
    run = replace(run, data=replace(run.data, vocab_size=400))
    prepare(run)
    folder = Path(run.data.path)
    record = json.loads((folder / "dataset.json").read_text())
    assert "weight_levels" not in record and "task" not in record
    with tarfile.open(folder / record["splits"]["train"]["shards"][0]["file"]) as tar:
        assert not [name for name in tar.getnames() if "weights" in name]
    with np.load(folder / "train.index.npz") as index:
        assert sorted(index) == ["offset", "shard", "tokens"]
    dataset = TokenDataset(folder, "train")
    batch = StreamReader(dataset, range(4), 4, 16, seed=0).next(8)
    assert batch is not None and not dataset.weighted
    assert set(batch.loss_mask.unique().tolist()) <= {0.0, 1.0}
    assert batch.loss_weight == batch.num_valid and isinstance(batch.loss_weight, float)


def test_unigram_entropy_is_weighted(run: RunConfig) -> None:
    dataset = TokenDataset(Path(run.data.path), "held_out")
    counts = np.zeros(dataset.vocab_size)
    for number, size in enumerate(dataset.document_lengths):
        np.add.at(counts, dataset.read(number, 1, int(size) - 1), dataset.read_weights(number, 1, int(size) - 1))
    shares = counts[counts > 0] / counts.sum()
    assert unigram_entropy(dataset) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-6)


def test_damaged_weight_is_refused(run: RunConfig, tmp_path: Path) -> None:
    damaged = task_run(tmp_path)
    prepare(damaged)
    folder = Path(damaged.data.path)
    dataset = TokenDataset(folder, "train")
    path = folder / load_manifest(folder).splits["train"].shards[0].file
    content = bytearray(path.read_bytes())
    content[int(dataset._weight_offset[2]) + 4] = 7
    path.write_bytes(content)
    dataset.read_weights(2, 0, 4)
    with pytest.raises(UserError, match="is damaged in document 2"):
        dataset.read_weights(2, 0, 5)


def test_task_flag_is_short_for_task_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expand_aliases(["prepare", "--task", "passkey"]) == ["prepare", "--task.kind", "passkey"]
    assert expand_aliases(["prepare", "--task=babi", "--run_dir", "x"]) == ["prepare", "--task.kind=babi", "--run_dir", "x"]
    assert expand_aliases(["--task", "task.yaml", "--run_dir", "babi"]) == ["--task", "task.yaml", "--run_dir", "babi"]
    arguments = ["--task.samples", "5", "--task.held_out_samples", "2", "--data.vocab_size", "384"]
    assert main(["prepare", "--task", "passkey", "--data.path", str(tmp_path / "data"), *arguments]) == 0
    assert "train: 5 documents" in capsys.readouterr().out
    assert main(["prepare", "--task", "passkey", "--task.keys", "2", "--data.path", str(tmp_path / "b")]) == 2
    assert "task.keys is 2" in capsys.readouterr().err
