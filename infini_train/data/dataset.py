"""Random access to the tokens of a prepared split. Reads only the requested bytes, and does not import torch."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from infini_train.config import RunConfig
from infini_train.data.manifest import REMEDY, SPLITS, Shard, SplitFacts, index_file, load_manifest
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import file_digest
from infini_train.runtime.retries import TRANSIENT_ERRORS, retry_read
from infini_train.tokenizers.tokenizer import tokenizer_file

MAX_OPEN_SHARDS = 64
"""Shards that a process keeps open; a large corpus has more shards than the limit of open files."""


class TokenDataset:
    """Documents of one split, in the order in which they were written.

    Args:
        path: folder written by `infini-train prepare`.
        split: train or held_out.
        bad_shards: names of shard files that are missing or damaged. Their documents keep their number and length, but
            `available` is false for them.

    Attributes:
        document_lengths: [num_documents] int64, tokens of each document, including its begin and end token.
        available: [num_documents] bool, whether the document can be read.
        vocab_size: size of the vocabulary; all token ids are smaller.
        tokenizer_fingerprint: SHA-256 of the tokenizer that encoded the documents.
        fingerprint: fingerprint of the split's shards, see `SplitFacts`.
        weighted: whether the split stores a loss weight for each token; otherwise every weight is 1.

    Raises:
        UserError: if dataset.json, the index or a shard is missing or damaged, or if a shard's size differs from the
            recorded size.
    """

    weighted = False

    def __init__(self, path: Path, split: str, bad_shards: frozenset[str] = frozenset()) -> None:
        self.path = Path(path)
        self.split = split
        manifest = load_manifest(self.path)
        if split not in manifest.splits:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        self.vocab_size = manifest.vocab_size
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self._token_type = np.dtype(manifest.token_type)
        facts = manifest.splits[split]
        self.fingerprint = facts.fingerprint
        self._files = [self.path / shard.file for shard in facts.shards]
        for shard in facts.shards:
            if shard.file not in bad_shards and (damage := shard_damage(self.path, shard, checksum=False)) is not None:
                raise UserError(f"{damage}; {REMEDY}")
        self.weighted = manifest.weight_levels is not None
        self._weight_levels = np.array(manifest.weight_levels or [1.0], dtype=np.float32)
        self._shard, self._offset, self.document_lengths, self._weight_offset = self._load_index(facts)
        self.available = ~np.array([shard.file in bad_shards for shard in facts.shards])[self._shard]
        self._open: OrderedDict[int, int] = OrderedDict()
        # Open shards relative to this descriptor and not by path: `prepare --overwrite` puts other shards under the same path.
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    @property
    def num_documents(self) -> int:
        return len(self.document_lengths)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Read tokens start .. start + count - 1 of a document from disk, without reading the rest of the document.

        Returns:
            [count] int64.

        Raises:
            IndexError: if the document does not have these tokens.
            UserError: if the shard cannot be read, or if its bytes are not token ids.
        """
        tokens = self._read(document, start, count, self._offset, self._token_type, self.vocab_size)
        return tokens.astype(np.int64)

    def read_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Read the loss weights of tokens start .. start + count - 1 of a document of a `weighted` split.

        Returns:
            [count] float32, the weight of each token's cross-entropy term in the loss.

        Raises:
            IndexError, UserError: as for `read`.
        """
        levels = self._read(document, start, count, self._weight_offset, np.dtype(np.uint8), len(self._weight_levels))
        return self._weight_levels[levels]

    def _read(self, document: int, start: int, count: int, offset: np.ndarray, kind: np.dtype, limit: int) -> np.ndarray:
        """Read one number per token: token ids, or numbers of weight levels.

        Args:
            offset: [num_documents] bytes from the start of the shard to the document's first number.
            kind: numpy type of the numbers.
            limit: every number must be smaller.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document is {document}; the {self.split} split has {self.num_documents}")
        length = int(self.document_lengths[document])
        if start < 0 or count < 0 or start + count > length:
            raise IndexError(f"tokens {start} to {start + count} of document {document}, which has {length}")
        shard, width = int(self._shard[document]), kind.itemsize
        try:
            place = int(offset[document]) + start * width
            data = retry_read(lambda: self._bytes(shard, count * width, place), self._files[shard])
        except OSError as error:
            raise UserError(f"{self._files[shard]} cannot be read ({error.strerror}); {REMEDY}") from error
        numbers = np.frombuffer(data, dtype=kind)
        if len(numbers) != count or (count and numbers.max() >= limit):
            raise UserError(f"{self._files[shard]} is damaged in document {document}; {REMEDY}")
        return numbers

    def _bytes(self, shard: int, size: int, offset: int) -> bytes:
        try:
            return _read_fully(self._descriptor(shard), size, offset)
        except OSError:
            if shard in self._open:
                with suppress(OSError):
                    os.close(self._open.pop(shard))
            raise

    def close(self) -> None:
        """Close the open shards. A later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_folder"):
            self.close()
            os.close(self._folder)

    def _descriptor(self, shard: int) -> int:
        """Return the file descriptor of a shard; open the shard if needed, and close the least recently used one."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self._files[shard].name, os.O_RDONLY, dir_fd=self._folder)
        except OSError as error:
            if error.errno in TRANSIENT_ERRORS:
                raise
            if not self._folder_unchanged():
                raise UserError(
                    f"data.path {self.path} was replaced or moved away while it was read; restore the original folder, or "
                    "start a new run with the current one"
                ) from error
            raise UserError(f"{self._files[shard]} cannot be opened ({error.strerror}); {REMEDY}") from error
        return self._open[shard]

    def _folder_unchanged(self) -> bool:
        """Return whether `path` still leads to the folder that was opened."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError:
            return False

    def _load_index(self, facts: SplitFacts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        path = self.path / index_file(self.split)
        try:
            with np.load(path) as index:
                shard, offset, tokens = index["shard"], index["offset"], index["tokens"]
                weight_offset = index["weight_offset"] if self.weighted else np.zeros_like(offset)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is missing or damaged ({error}); {REMEDY}") from error
        sizes = np.array([entry.bytes for entry in facts.shards])
        fits = (
            len(shard) == len(offset) == len(tokens) == len(weight_offset) == facts.documents
            and int(tokens.sum()) == facts.tokens
            and shard.max(initial=-1) < len(sizes)
            and bool((offset + tokens * self._token_type.itemsize <= sizes[shard]).all())
            and (not self.weighted or bool((weight_offset + tokens <= sizes[shard]).all()))
        )
        if not fits:
            raise UserError(f"{path} does not match dataset.json; {REMEDY}")
        return shard, offset, tokens.astype(np.int64), weight_offset


def _read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes from `offset`, or fewer at the end of the file. One pread may return fewer bytes than requested."""
    chunks = []
    while size > 0 and (chunk := os.pread(descriptor, size, offset)):
        chunks.append(chunk)
        size -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def shard_damage(folder: Path, shard: Shard, *, checksum: bool) -> str | None:
    """Describe the damage of a shard in a phrase that starts with its path; return None if the shard is intact.

    Args:
        checksum: also read the whole file and compare its SHA-256.
    """
    path = folder / shard.file

    def read() -> str | None:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{path} has {size} bytes where dataset.json says {shard.bytes}"
        if checksum and file_digest(path) != shard.sha256:
            return f"{path} has another checksum (SHA-256) than dataset.json says"
        return None

    try:
        return retry_read(read, path)
    except FileNotFoundError as error:
        return f"{path} is missing ({error.strerror})"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def check_dataset(config: RunConfig, splits: tuple[str, ...] = SPLITS) -> None:
    """Check that the data folder exists, is not damaged and was prepared for the configured vocabulary.

    Args:
        splits: splits that the run needs.

    Raises:
        UserError: if a check fails; names the key or file and the remedy.
    """
    folder = Path(config.data.path)
    if not folder.is_dir():
        raise UserError(
            f"data.path {folder} does not exist; run `infini-train prepare --config FILE` with this configuration first"
        )
    manifest = load_manifest(folder)
    if manifest.vocab_size != config.data.vocab_size:
        raise UserError(
            f"data.vocab_size is {config.data.vocab_size}, but data.path {folder} was prepared with {manifest.vocab_size}; "
            f"set data.vocab_size to {manifest.vocab_size}, or {REMEDY}"
        )
    tokenizer = tokenizer_file(folder)
    try:
        fingerprint = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{tokenizer} is missing or unreadable ({error.strerror}); {REMEDY}") from error
    if fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{tokenizer} is not the tokenizer that made the shards (its fingerprint differs); {REMEDY}")
    for split in splits:
        bad: frozenset[str] = frozenset()
        if split == "train" and config.data.on_bad_shard == "skip":
            # `training/shard_check.py` reports bad shards when the run starts, on all ranks together.
            shards = manifest.splits[split].shards
            bad = frozenset(shard.file for shard in shards if shard_damage(folder, shard, checksum=False) is not None)
        TokenDataset(folder, split, bad)
