"""The prepare command: atomic writing of the folder, a correct summary, and errors of one line."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from infini_train.config import DataConfig, ModelConfig, RunConfig
from infini_train.data import preparation as prepare_module
from infini_train.data.dataset import TokenDataset, check_dataset
from infini_train.data.preparation import prepare
from infini_train.data.streams import StreamReader
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(30):
        (source / f"{i:02d}.txt").write_text(f"chapter {i}\n" + f"line {i} of a book about streams\n" * (3 * i + 1))
    (source / "empty.txt").write_text("")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    data = DataConfig(source=str(source), path=str(tmp_path / "out" / "data"), vocab_size=300, held_out_fraction=0.3)
    return RunConfig(model=ModelConfig(segment_length=16), data=data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepared_folder_and_summary_match_the_source(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    summary = prepare(config)
    check_dataset(config)
    folder = Path(config.data.path)
    texts = [p.read_text() for p in sorted(Path(config.data.source).glob("[0-9]*.txt"))]
    assert (summary.documents, summary.characters) == (30, sum(map(len, texts)))
    assert (summary.skipped_empty, summary.skipped_not_utf8) == (1, 1)
    assert summary.characters_per_token == summary.characters / summary.tokens > 1.5
    tokenizer, found = SentencePieceTokenizer(folder / "tokenizer.model"), []
    for split, facts in summary.splits.items():
        dataset = TokenDataset(folder, split)
        assert dataset.tokenizer_fingerprint == tokenizer.fingerprint
        found += [tokenizer.decode(dataset.read(i, 0, int(n)).tolist()) for i, n in enumerate(dataset.document_lengths)]
        assert facts.tokens == dataset.document_lengths.sum()
        # The padding in the summary equals the padding in the streams.
        stream, valid, slots = StreamReader(dataset, range(1), 1, 16, seed=0, num_epochs=1), 0, 0
        while (batch := stream.next(1)) is not None:
            valid, slots = valid + batch.num_valid, slots + batch.tokens.numel()
        assert facts.padding_share == pytest.approx(1 - valid / slots) and facts.padding_share > 0
    assert sorted(found) == sorted(texts)
    printed = capsys.readouterr()
    assert f"30 documents, {summary.characters:,} characters" in printed.out
    assert f"segments of 16 cost {summary.splits['train'].padding_share:.1%} padding" in printed.out
    assert "1 empty, 1 not in UTF-8" in printed.out
    assert "    empty: empty.txt\n    not in UTF-8: latin.txt" in printed.out
    assert "Writing shards" in printed.err and "standard library" not in printed.err


def test_standard_library_source_is_announced(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.data.source, config.data.max_text_mb, config.data.vocab_size = "stdlib", 0.5, 400
    summary = prepare(config)
    assert 0.5e6 <= summary.characters < 1.5e6
    assert "Python's standard library" in capsys.readouterr().err


def test_given_tokenizer_is_copied(config: RunConfig, tmp_path: Path) -> None:
    prepare(config)
    model = tmp_path / "given.model"
    shutil.copyfile(Path(config.data.path) / "tokenizer.model", model)
    config.data.tokenizer, config.data.path = str(model), str(tmp_path / "second")
    prepare(config)
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == model.read_bytes()
    config.data.vocab_size = 301
    with pytest.raises(UserError, match=r"data\.vocab_size is 301, .* 300 ids; set data\.vocab_size to 300"):
        prepare(config, overwrite=True)
    config.data.tokenizer = str(tmp_path / "none.model")
    with pytest.raises(UserError, match=r"none\.model cannot be read"):
        prepare(config, overwrite=True)


def test_finished_folder_is_replaced_only_with_overwrite(config: RunConfig) -> None:
    prepare(config)
    folder = Path(config.data.path)
    before = contents(folder)
    with pytest.raises(UserError, match=r"data\.path .* prepared already; pass --overwrite"):
        prepare(config)
    assert contents(folder) == before
    config.data.vocab_size = 310
    prepare(config, overwrite=True)
    assert contents(folder).keys() == before.keys() and contents(folder) != before
    check_dataset(config)
    assert os.listdir(folder.parent) == ["data"]


def test_foreign_files_are_never_deleted(config: RunConfig) -> None:
    prepare(config)
    note = Path(config.data.path) / "notes.md"
    note.write_text("mine")
    with pytest.raises(UserError, match=r"data\.path .* notes\.md"):
        prepare(config, overwrite=True)
    assert note.read_text() == "mine"
    config.data.path = config.data.source
    with pytest.raises(UserError, match=r"data\.path .* 00\.txt"):
        prepare(config, overwrite=True)
    config.data.path = str(note)
    with pytest.raises(UserError, match=r"data\.path .* is a file"):
        prepare(config, overwrite=True)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_keeps_the_old_folder(config: RunConfig, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    prepare(config)
    folder = Path(config.data.path)
    before = contents(folder)

    def fail(*args: object, **options: object) -> None:
        (folder.parent / "data.partial" / "half").write_text("")
        raise failure

    monkeypatch.setattr(prepare_module, "write_shards", fail)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"data\.path .*No space left" if expected is UserError else None):
        prepare(config, overwrite=True)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == ["data"]


def test_leftovers_of_a_killed_process_are_removed(config: RunConfig) -> None:
    folder = Path(config.data.path)
    partial = folder.parent / "data.partial"
    (partial / "sub").mkdir(parents=True)
    (partial / "train-000000.tar").write_text("half")
    prepare(config)
    check_dataset(config)
    assert "sub" not in contents(folder) and os.listdir(folder.parent) == ["data"]
    # A process killed between the two renames, of the old folder and of the new one: the old folder is restored.
    folder.rename(folder.parent / "data.replaced")
    with pytest.raises(UserError, match="prepared already"):
        prepare(config)
    check_dataset(config)


def test_two_processes_cannot_prepare_one_folder(config: RunConfig) -> None:
    partial = Path(config.data.path + ".partial")
    partial.mkdir(parents=True)
    with open(partial / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is preparing data\.path"):
            prepare(config)
    prepare(config)


def test_symbolic_link_to_the_folder_is_kept(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "big_disk").mkdir()
    link = Path(config.data.path)
    link.parent.mkdir()
    link.symlink_to(tmp_path / "big_disk")
    prepare(config)
    assert link.is_symlink() and (tmp_path / "big_disk" / "dataset.json").is_file()
    check_dataset(config)


def test_bad_configuration_is_refused_before_anything_is_written(config: RunConfig) -> None:
    config.data.held_out_fraction = 1.5
    with pytest.raises(UserError, match=r"data\.held_out_fraction"):
        prepare(config)
    config.data.held_out_fraction, config.data.source = 0.3, "nowhere"
    with pytest.raises(UserError, match=r"data\.source nowhere"):
        prepare(config)
    assert not Path(config.data.path).parent.exists()
