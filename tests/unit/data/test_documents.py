"""Document sources: the same documents from every file format, and errors that name file, line and key."""

import errno
import gzip
import json
import os
import sysconfig
from pathlib import Path

import datasets
import pytest
import zstandard

from infini_train.data.documents import DocumentSource
from infini_train.runtime.errors import UserError

TEXTS = ["first\r\nline", "  zweites – Ω\n", "\u2581third\0", "fourth" * 50]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def read(source: Path | str, **options: object) -> list[str]:
    return [document.text for document in DocumentSource(str(source), **options)]  # type: ignore[arg-type]


def write_source(folder: Path, kind: str) -> Path:
    """Write the four TEXTS as a source of the given kind, and return its path."""
    folder.mkdir(exist_ok=True)
    if kind == "files":
        (folder / "b").mkdir()
        for name, text in zip(("a.txt", "c.MD", "b/d.py", "b/e.txt"), TEXTS, strict=True):
            (folder / name).write_bytes(text.encode())
        (folder / "ignored.bin").write_bytes(b"\xff")
        return folder
    if kind == "hf":
        datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3, 4]}).save_to_disk(str(folder / "hf"))
        return folder / "hf"
    if kind == "hf_dict":
        splits = {"a": TEXTS[:2], "b": TEXTS[2:]}
        datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(
            str(folder / "hf")
        )
        return folder / "hf"
    data, path = jsonl(TEXTS), folder / f"records.{kind}"
    if kind == "jsonl.gz":
        data = gzip.compress(data)
    elif kind == "jsonl.zst":
        # Two frames, cut in the middle of a line; no final newline.
        data = zstandard.compress(data[:40]) + zstandard.compress(data[40:].rstrip())
    elif kind == "jsonl":
        data = data.replace(b"\n", b"\n\n").rstrip()  # blank lines and no final newline
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["files", "jsonl", "jsonl.gz", "jsonl.zst", "hf", "hf_dict"])
def test_every_source_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    source = DocumentSource(str(write_source(tmp_path / "s", kind)))
    assert [d.text for d in source] == TEXTS
    assert [d.text for d in source] == TEXTS, "a second pass starts from the beginning"
    assert (source.documents, source.text_bytes) == (4, sum(len(t.encode()) for t in TEXTS))
    assert source.fraction_read == 1.0


def test_folder_of_records_and_files_is_read_in_order_with_names(tmp_path: Path) -> None:
    (tmp_path / "2.txt").write_text("two")
    (tmp_path / "1.jsonl").write_bytes(jsonl(["one", "uno"]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "0.md").write_text("three")
    documents = [(d.text, d.name) for d in DocumentSource(str(tmp_path))]
    assert documents == [("one", "1.jsonl:1"), ("uno", "1.jsonl:2"), ("two", "2.txt"), ("three", "sub/0.md")]


def test_progress_grows_with_bytes_read(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("x" * 100)
    source = DocumentSource(str(tmp_path))
    assert [source.fraction_read for _ in source] == [0.0, 0.25, 0.5, 0.75]
    capped = DocumentSource(str(tmp_path), max_text_mb=0.0002)
    assert [capped.fraction_read for _ in capped] == [0.5, 1.0]


def test_standard_library_leaves_out_installed_packages() -> None:
    names = [document.name for document in DocumentSource("stdlib", max_text_mb=4)]
    assert "argparse.py" in names and len(names) > 50
    assert names[0] == "__future__.py" and all(name.endswith(".py") for name in names)
    paths = [path.as_posix() for path in DocumentSource("stdlib")._paths()]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert not any("site-packages" in p or "dist-packages" in p or "__pycache__" in p for p in paths)
    assert (root / "json" / "decoder.py").as_posix() in paths


def test_unreadable_text_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b" \n\t")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfkept")
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "\\ud800"}\n{"text": null}\n')
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xe9.txt")).write_bytes(b"\xe9")
    source = DocumentSource(str(tmp_path))
    assert [d.text for d in source] == ["kept"]
    assert (source.skipped_not_utf8, source.skipped_empty) == (3, 3)
    not_utf8 = ["a.txt", "e.jsonl:1", "f\\xe9.txt"]  # names that are not UTF-8 are escaped
    assert source.skipped_names == {"empty": ["b.txt", "c.txt", "e.jsonl:2"], "not in UTF-8": not_utf8}


def test_first_skipped_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9 + '{"text": "kept"}\n')
    source = DocumentSource(str(tmp_path))
    assert len(list(source)) == len(list(source)) == 1
    assert source.skipped_names["empty"] == [f"a.jsonl:{number}" for number in range(1, 6)]


def test_max_text_mb_stops_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x" * 400, "é" * 300, "z"]) + b"never parsed")
    assert read(path, max_text_mb=0.001) == ["x" * 400, "é" * 300]
    for limit, more in ((0.001, True), (None, False), (1.0, False)):
        path.write_bytes(jsonl(["x" * 400, "é" * 300, "z"]))
        source = DocumentSource(str(path), max_text_mb=limit)
        assert len(list(source)) == (2 if more else 3) and source.stopped_early == more


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "broken\n', ["line 2", "not valid JSON", "repair"]),
        (b'{"text": "\xff"}\n', ["line 2", "not valid JSON"]),
        (b'{"body": "x"}\n', ["line 2", "'text'", "body", "data.text_key"]),
        (b'{"text": 3}\n', ["line 2", "int", "data.text_key"]),
        (b"[1]\n", ["line 2", "list", "data.text_key"]),
    ],
)
def test_bad_record_names_file_line_and_remedy(tmp_path: Path, line: bytes, words: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl(["good"]) + line)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_truncated_or_damaged_compression_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_source(tmp_path / "s", kind)
    whole = path.read_bytes()
    # A truncated frame whose lines are all valid. Without the check, the lost remainder would not be noticed.
    good = jsonl(TEXTS)
    compressor = zstandard.ZstdCompressor().compressobj()
    cut = compressor.compress(good) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path.write_bytes(cut if kind == "jsonl.zst" else whole[:-8])
    with pytest.raises(UserError, match=r"records"):
        read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match=r"records.*damaged"):
        read(path)


def test_custom_text_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x"], key="content"))
    assert read(path, text_key="content") == ["x"]


def test_hugging_face_errors_name_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path / "s", "hf")
    with pytest.raises(UserError, match=r"data\.text_key"):
        read(folder, text_key="body")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match=r"broken cannot be opened as a Hugging Face dataset"):
        read(tmp_path / "broken")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"infini-train\[hf\]"):
        read(folder)


def test_missing_unknown_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source .*nowhere does not exist"):
        DocumentSource(str(tmp_path / "nowhere"))
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match=r"data\.source .*a\.pdf"):
        DocumentSource(str(tmp_path / "a.pdf"))
    with pytest.raises(UserError, match=r"data\.source .* holds no document"):
        read(tmp_path)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "s", tmp_path / "elsewhere"
    for folder, text in ((source / "b", "inside"), (elsewhere / "deep", "linked")):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(text)
    (source / "a").symlink_to(elsewhere)
    (source / "b" / "again").symlink_to(elsewhere)
    (source / "b" / "loop").symlink_to(source)
    assert [d.name for d in DocumentSource(str(source))] == ["a/deep/a.txt", "b/a.txt"]


def test_unreadable_files_are_errors_and_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "a.txt").write_text("kept")
    (closed / "b.txt").write_text("kept too")

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may read everything
        open_folder = os.scandir
        patch.setattr(os, "scandir", lambda path: refuse(path) if Path(path) == closed else open_folder(path))
        with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\); .* out of data\.source"):
            read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        with pytest.raises(UserError, match=r"closed/dataset_dict\.json cannot be read \(Permission denied\)"):
            read(closed)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read \(No such file"):
        read(tmp_path)


def test_damaged_or_empty_dataset_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    datasets.Dataset.from_dict({"text": ["text " * 100] * 100}).save_to_disk(str(folder))
    [path] = folder.glob("*.arrow")
    path.write_bytes(path.read_bytes().replace(b"text " * 100, b"\xff" * 500))
    with pytest.raises(UserError, match=r"data\.source .*damaged is damaged after row 0"):
        read(folder)
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"data\.source .*empty cannot be opened"):
        read(tmp_path / "empty")


def test_too_deeply_nested_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match=r"line 1 is not valid JSON"):
        read(tmp_path)
