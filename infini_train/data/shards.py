"""Writing of WebDataset shards. Each document is one sample with its tokens and a small JSON record."""

from __future__ import annotations

import hashlib
import math
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from infini_train.data.documents import Document
from infini_train.data.manifest import SPLITS, WEIGHT_MEMBER, Manifest, Shard, SplitFacts, index_file, token_format
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import file_digest
from infini_train.tokenizers.tokenizer import Tokenizer, usable_cores

TAR_BLOCK = 512
TAR_END = 10240
"""The size of a tar file is padded with zeros to a multiple of this many bytes."""
BATCH_CHARACTERS = 4_000_000
BATCH_DOCUMENTS = 1024


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str,
    held_out_fraction: float,
    shard_size_mb: float,
) -> Manifest:
    """Tokenise documents into the shards of both splits, then write the indexes and `dataset.json`.

    A document's tokens are [begin] + encode(text) + [end]. A hash of its text decides its split. So equal documents are in the
    same split, and the split does not depend on the order of the source.

    Args:
        folder: an existing empty folder; see `atomic_folder`.
        source: recorded in `dataset.json`.
        held_out_fraction: expected fraction of the documents in the held_out split.
        shard_size_mb: maximum size of a shard in megabytes; a larger document gets a shard of its own.

    Raises:
        UserError: if a split would be empty; names a held_out_fraction for which neither split is empty.
    """
    token_type, member = token_format(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder, split, int(shard_size_mb * 1e6), member) for split in SPLITS}
    lowest, highest, number = 1.0, 0.0, 0
    try:
        for document, ids in _tokenised(documents, tokenizer):
            fraction = text_hash_fraction(document.text)
            lowest, highest, number = min(lowest, fraction), max(highest, fraction), number + 1
            tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=token_type)
            writers["held_out" if fraction < held_out_fraction else "train"].write(document, tokens)
    finally:
        for writer in writers.values():
            writer.close()
    _check_splits_not_empty(lowest, highest, number, held_out_fraction)
    return finish_shards(folder, tokenizer, source, writers)


def finish_shards(
    folder: Path,
    tokenizer: Tokenizer,
    source: str,
    writers: dict[str, SplitWriter],
    *,
    weight_levels: list[float] | None = None,
    task: dict[str, Any] | None = None,
) -> Manifest:
    """Write the indexes and `dataset.json` for closed writers, one per split."""
    token_type, member = token_format(tokenizer.vocab_size)
    manifest = Manifest(
        source=source,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        token_type=token_type,
        token_member=member,
        splits={split: writer.facts() for split, writer in writers.items()},
        weight_levels=weight_levels,
        task=task,
    )
    for split, facts in manifest.splits.items():
        _write_index(folder, split, facts, member, np.dtype(token_type).itemsize, weighted=weight_levels is not None)
    manifest.save(folder)
    return manifest


def text_hash_fraction(text: str) -> float:
    """Map a text to a number in [0, 1) by its SHA-256. A document is held out if the number is below held_out_fraction."""
    # Use 53 bits, so that the quotient is exact and below 1.
    return (int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def _tokenised(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Yield documents with their token ids. Encode in batches, which uses all cores and limits the text in memory."""
    threads = usable_cores()
    for batch in _batches(documents):
        yield from zip(batch, tokenizer.encode_batch([d.text for d in batch], num_threads=threads), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_splits_not_empty(lowest: float, highest: float, number: int, held_out_fraction: float) -> None:
    if lowest < held_out_fraction <= highest:
        return
    empty = "train" if highest < held_out_fraction else "held_out"
    if lowest >= highest:
        raise UserError(
            f"data.source holds {number} document{'' if number == 1 else 's of equal text'}, which leaves the {empty} split "
            "empty; give at least two different documents"
        )
    raise UserError(
        f"data.held_out_fraction is {held_out_fraction}, which leaves the {empty} split of {number} documents empty; set it "
        f"to {_short_number(lowest, highest, from_below=empty == 'held_out')}, or give more documents"
    )


def _short_number(lowest: float, highest: float, from_below: bool) -> str:
    """Return the number with the fewest decimals in (lowest, highest]: the smallest one if from_below, else the largest."""
    for decimals in range(1, 17):
        scale = 10**decimals
        number = (math.floor(lowest * scale) + 1 if from_below else math.floor(highest * scale)) / scale
        if lowest < number <= highest:
            return f"{number:.{decimals}f}"
    return repr(highest)


@dataclass
class SplitWriter:
    """Writer of one split. One shard is open at a time."""

    folder: Path
    split: str
    max_bytes: int
    member: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    files: list[str] = field(default_factory=list)
    _size: int = 0
    _writer: Any = None

    def write(self, document: Document, tokens: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Append a document.

        Args:
            tokens: [n], in the split's token type.
            weights: [n] uint8, for each token the index of its loss weight in `Manifest.weight_levels`.
        """
        record: dict[str, Any] = {"source": document.name, "characters": len(document.text), "tokens": len(tokens)}
        # The blocks are an upper bound for the JSON member and the tar headers; the exact size is not needed.
        size = tokens.nbytes + (0 if weights is None else weights.nbytes) + 8 * TAR_BLOCK
        if self._writer is None or (self._size > TAR_END and self._size + size > self.max_bytes):
            self._next_shard()
        # The key is unique in the split, so that shards can be shuffled or merged.
        members = {"__key__": f"{self.documents:010d}", self.member: tokens.tobytes(), "json": record}
        self._writer.write(members if weights is None else members | {WEIGHT_MEMBER: weights.tobytes()})
        self._size += size
        self.documents += 1
        self.tokens += len(tokens)
        self.characters += len(document.text)

    def _next_shard(self) -> None:
        self.close()
        self.files.append(f"{self.split}-{len(self.files):06d}.tar")
        # Fix the time and the owner, so that the same corpus gives the same bytes.
        self._writer = webdataset.TarWriter(
            str(self.folder / self.files[-1]), mtime=0.0, user="infini", group="infini", compress=False
        )
        self._size = TAR_END

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def facts(self) -> SplitFacts:
        shards = [Shard(file, (self.folder / file).stat().st_size, file_digest(self.folder / file)) for file in self.files]
        return SplitFacts(self.documents, self.tokens, self.characters, shards)


def _write_index(folder: Path, split: str, facts: SplitFacts, member: str, token_bytes: int, *, weighted: bool = False) -> None:
    """Write the positions of each document's tokens and weights, read from the finished tars so that they match the disk."""
    shard, offset, tokens, weight_offset = [], [], [], []
    for number, entry in enumerate(facts.shards):
        with tarfile.open(folder / entry.file) as tar:
            for item in tar:
                if item.name.endswith("." + member):
                    shard.append(number)
                    offset.append(item.offset_data)
                    tokens.append(item.size // token_bytes)
                elif item.name.endswith("." + WEIGHT_MEMBER):
                    weight_offset.append(item.offset_data)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member in a list
    arrays: dict[str, Any] = {
        "shard": np.array(shard, dtype=np.int32),
        "offset": np.array(offset, dtype=np.int64),
        "tokens": np.array(tokens, dtype=np.int64),
    }
    if weighted:
        arrays["weight_offset"] = np.array(weight_offset, dtype=np.int64)
    np.savez(folder / index_file(split), **arrays)
