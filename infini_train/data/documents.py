"""Documents from text files, .jsonl records or a Hugging Face dataset folder. A document is never split."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from infini_train.runtime.errors import UserError

PLAIN_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
HUGGING_FACE_MARKERS = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Files that identify a folder written by `datasets.Dataset.save_to_disk`."""
READ_BYTES = 1 << 20
MAX_SKIPPED_NAMES = 5
"""Skipped texts whose names are recorded, for each reason."""


class Document(NamedTuple):
    """A text and its origin: a path inside the source, with `:line` or `:row` for records."""

    text: str
    name: str


class DocumentSource:
    """Iterable over the documents of a source, in a fixed order. One document is in memory at a time.

    Every iteration starts from the beginning and resets the counters.

    Args:
        source: the word `stdlib`, a folder, a file, or a folder written by `datasets.Dataset.save_to_disk`.
        text_key: field that holds the text in .jsonl records and dataset rows.
        max_text_mb: stop after the document that brings the text to this many megabytes of UTF-8; None reads all.

    Attributes:
        documents: number of documents yielded so far.
        text_bytes: their size in UTF-8, in bytes.
        stopped_early: whether the source has more text than max_text_mb.
        skipped_not_utf8: number of files and records whose text is not valid UTF-8.
        skipped_empty: number of texts that are empty or hold only white space.
        skipped_names: the first MAX_SKIPPED_NAMES names for each reason.

    Raises:
        UserError: at construction if the source is missing or of an unknown kind; while iterating if a file or record
            cannot be read, or if the source holds no document.
    """

    def __init__(self, source: str, text_key: str = "text", max_text_mb: float | None = None) -> None:
        self.source = source
        self.text_key = text_key
        self.max_text_bytes = None if max_text_mb is None else max_text_mb * 1e6
        self.is_standard_library = source == "stdlib"
        self.root = Path(sysconfig.get_paths()["stdlib"]) if self.is_standard_library else Path(source)
        with _report_read_errors(self.root):
            if not self.root.exists():
                raise UserError(f"data.source {source} does not exist; give a file, a folder or the word stdlib")
            self.is_hugging_face = self.root.is_dir() and any((self.root / name).is_file() for name in HUGGING_FACE_MARKERS)
        if self.root.is_file() and not _is_text_file(self.root):
            kinds = ", ".join(PLAIN_SUFFIXES + RECORD_SUFFIXES)
            raise UserError(f"data.source {source} is a file of unknown kind; its name must end in one of {kinds}")
        self._reset()

    def _reset(self) -> None:
        self.documents = 0
        self.text_bytes = 0
        self.skipped_not_utf8 = 0
        self.skipped_empty = 0
        self.skipped_names: dict[str, list[str]] = {"empty": [], "not in UTF-8": []}
        self.stopped_early = False
        self._work_done = 0

    @property
    def fraction_read(self) -> float:
        """Fraction of the source that this iteration has read, 0 to 1; an estimate for progress displays."""
        fraction = self._work_done / max(self._work_total, 1)
        if self.max_text_bytes is not None:
            fraction = max(fraction, self.text_bytes / self.max_text_bytes)
        return min(fraction, 1.0)

    def __iter__(self) -> Iterator[Document]:
        self._reset()
        for text, name in self._hugging_face_rows() if self.is_hugging_face else self._files():
            if self.max_text_bytes is not None and self.text_bytes >= self.max_text_bytes:
                self.stopped_early = True
                return
            if not text.strip():
                self._skip_empty(name)
                continue
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError:  # a lone surrogate, which a JSON escape such as \ud800 can produce
                self._skip_not_utf8(name)
                continue
            self.documents += 1
            self.text_bytes += size
            yield Document(text, name)
        if not self.documents:
            raise UserError(
                f"data.source {self.source} holds no document: {self.skipped_empty} empty and {self.skipped_not_utf8} "
                f"not in UTF-8; give text in {', '.join(PLAIN_SUFFIXES + RECORD_SUFFIXES)} files"
            )

    def _skip_empty(self, name: str) -> None:
        self.skipped_empty += 1
        self._name_skipped("empty", name)

    def _skip_not_utf8(self, name: str) -> None:
        self.skipped_not_utf8 += 1
        self._name_skipped("not in UTF-8", name)

    def _name_skipped(self, reason: str, name: str) -> None:
        if len(self.skipped_names[reason]) < MAX_SKIPPED_NAMES:
            self.skipped_names[reason].append(name)

    @cached_property
    def _work_total(self) -> int:
        """Total of `_work_done`: bytes of all files, or rows of all dataset splits."""
        if self.is_hugging_face:
            return sum(len(rows) for rows in self._hugging_face_splits.values())
        return sum(path.stat().st_size for path in self._paths())

    def _paths(self) -> Iterator[Path]:
        if self.root.is_file():
            yield self.root
            return
        entered: set[tuple[int, int]] = set()
        with _report_read_errors(self.root):
            # Without onerror, os.walk treats a folder that cannot be read as empty.
            for folder, folders, files in os.walk(self.root, followlinks=True, onerror=_raise):
                facts = os.stat(folder)
                if (place := (facts.st_dev, facts.st_ino)) in entered:  # already visited through another link
                    folders.clear()
                    continue
                entered.add(place)
                # os.walk descends into the remaining entries of `folders`, in this order.
                folders[:] = sorted(name for name in folders if not (self.is_standard_library and name in NOT_STANDARD_LIBRARY))
                for name in sorted(files):
                    path = Path(folder, name)
                    is_text = path.suffix == ".py" if self.is_standard_library else _is_text_file(path)
                    # stat() raises an error for a broken link, whereas is_file() would skip the link.
                    if is_text and stat.S_ISREG(path.stat().st_mode):
                        yield path

    def _files(self) -> Iterator[tuple[str, str]]:
        for path in self._paths():
            before = self._work_done
            with _report_read_errors(path):
                if _is_record_file(path):
                    yield from self._records(path)
                else:
                    yield from self._plain(path)
                self._work_done = before + path.stat().st_size

    def _name(self, path: Path) -> str:
        name = path.name if path == self.root else path.relative_to(self.root).as_posix()
        # A name that is not UTF-8 could not be printed.
        return os.fsencode(name).decode("utf-8", errors="backslashreplace")

    def _plain(self, path: Path) -> Iterator[tuple[str, str]]:
        try:
            # Decode bytes, because text mode would turn \r\n into \n. Drop a byte order mark.
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            self._skip_not_utf8(self._name(path))
            return
        yield text, self._name(path)

    def _records(self, path: Path) -> Iterator[tuple[str, str]]:
        before = self._work_done
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(path, file), start=1):
                self._work_done = before + file.tell()
                if line.strip():
                    yield self._record_text(line, f"{path}, line {number}"), f"{self._name(path)}:{number}"

    def _record_text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise UserError(f"{place} is not valid JSON ({error}); repair or delete the line") from error
        return self._field(record, place)

    def _field(self, record: Any, place: str) -> str:
        if not isinstance(record, dict) or self.text_key not in record:
            found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{place} has no field {self.text_key!r} (found: {found}); set data.text_key to the field that holds the text"
            )
        text = record[self.text_key]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise UserError(
                f"{place}: field {self.text_key!r} holds {type(text).__name__}, not text; set data.text_key to a text field"
            )
        return text

    @cached_property
    def _hugging_face_splits(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"data.source {self.source} is a Hugging Face dataset and the package datasets is not installed; "
                "install the extra infini-train[hf]"
            ) from error
        try:
            loaded = datasets.load_from_disk(str(self.root))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._dataset_error("cannot be opened as a Hugging Face dataset", error) from error
        splits = {name: loaded[name] for name in sorted(loaded)} if isinstance(loaded, dict) else {"": loaded}
        for name, rows in splits.items():
            if self.text_key not in rows.column_names:
                raise UserError(
                    f"data.source {self.source} {name} has no column {self.text_key!r} (found: "
                    f"{', '.join(rows.column_names)}); set data.text_key to the column that holds the text"
                )
        # Drop the other columns: iteration would decode images or audio in them.
        return {name: rows.select_columns([self.text_key]) for name, rows in splits.items()}

    def _dataset_error(self, problem: str, error: Exception) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"data.source {self.source} {problem} ({reason}); save it again with save_to_disk")

    def _hugging_face_rows(self) -> Iterator[tuple[str, str]]:
        for split, rows in self._hugging_face_splits.items():
            name = f"{split}:0" if split else "0"
            try:
                for number, row in enumerate(rows):
                    self._work_done += 1
                    name = f"{split}:{number}" if split else str(number)
                    yield self._field(row, f"{self.source}, row {name}"), name
            except (OSError, ValueError) as error:
                raise self._dataset_error(f"is damaged after row {name}", error) from error


@contextmanager
def _report_read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the enclosed reads into a `UserError`.

    Args:
        path: the file or folder that is read; used where the error names no file.

    Raises:
        UserError: if a file or folder cannot be read.
    """
    try:
        yield
    except OSError as error:
        place, reason = error.filename or path, error.strerror or error
        raise UserError(f"{place} cannot be read ({reason}); repair it or take it out of data.source") from error


def _raise(error: OSError) -> None:
    raise error


def _is_record_file(path: Path) -> bool:
    return path.name.lower().endswith(RECORD_SUFFIXES)


def _is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(PLAIN_SUFFIXES + RECORD_SUFFIXES)


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a .jsonl file, decompressed according to its suffix."""
    name = path.name.lower()
    if name.endswith(".zst"):
        yield from _zstandard_lines(path, file)
    elif name.endswith(".gz"):
        try:
            yield from gzip.GzipFile(fileobj=file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}); copy or compress it again") from error
    else:
        yield from file


def _zstandard_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file of one or more zstandard frames.

    zstandard's stream_reader raises no error at the end of a truncated file. With a decompressobj per frame, the end of a
    frame and the end of the file can be distinguished.
    """
    # The largest window that zstd's --long option can write.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame: Any = None
    rest = b""
    try:
        while data := file.read(READ_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from lines
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is a damaged zstandard file ({error}); copy or compress it again") from error
    if frame is not None:
        raise UserError(f"{path} ends in the middle of a zstandard frame; copy or compress it again")
    if rest:
        yield rest
