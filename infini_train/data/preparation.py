"""The `prepare` command: turn text, or the samples of a task, into a tokenizer, shards and indexes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infini_train.config import RunConfig
from infini_train.config.validation import validate_data, validate_model, validate_task
from infini_train.data.atomic_folder import atomic_folder
from infini_train.data.dataset import TokenDataset
from infini_train.data.documents import Document, DocumentSource
from infini_train.data.held_out import held_out_warning
from infini_train.data.manifest import SPLITS, load_manifest
from infini_train.data.shards import write_shards
from infini_train.data.task_samples import make_filler, split_samples, task_texts, write_task_shards
from infini_train.runtime.errors import UserError
from infini_train.tasks import Sample
from infini_train.tokenizers.sentencepiece_tokenizer import train_tokenizer
from infini_train.tokenizers.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from infini_train.tokenizers.tokenizer_file import read_tokenizer


@dataclass
class SplitSummary:
    """Sizes of one split. `tokens` includes the begin and end token of every document."""

    documents: int
    characters: int
    tokens: int
    padding_share: float
    """Fraction of token positions that are padding when every document starts at a segment start."""


@dataclass
class PrepareSummary:
    """Contents of the data folder that `prepare` wrote. `str()` gives the text that the command prints."""

    path: Path
    vocab_size: int
    segment_length: int
    skipped_empty: int
    skipped_not_utf8: int
    skipped_names: dict[str, list[str]]
    """Names of the first skipped texts, for each reason."""
    stopped_at_mb: float | None
    """data.max_text_mb if the source has more text, else None."""
    splits: dict[str, SplitSummary]

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def characters(self) -> int:
        return sum(split.characters for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.documents:,} documents, {self.characters:,} characters, {self.tokens:,} tokens, "
            f"{self.characters_per_token:.2f} characters per token (vocabulary {self.vocab_size:,})"
        ]
        for name, split in self.splits.items():
            lines.append(
                f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens; segments of {self.segment_length} cost "
                f"{split.padding_share:.1%} padding"
            )
        if self.skipped_empty or self.skipped_not_utf8:
            lines.append(f"  skipped: {self.skipped_empty} empty, {self.skipped_not_utf8} not in UTF-8")
            counts = {"empty": self.skipped_empty, "not in UTF-8": self.skipped_not_utf8}
            for reason, names in self.skipped_names.items():
                more = ", ..." if counts[reason] > len(names) else ""
                lines += [f"    {reason}: {', '.join(names)}{more}"] if names else []
        if self.stopped_at_mb is not None:
            lines.append(
                f"  stopped after {self.stopped_at_mb:g} MB of text (data.max_text_mb), and data.source has more: "
                "--data.max_text_mb null takes all of it"
            )
        return "\n".join(lines)


def prepare(config: RunConfig, overwrite: bool = False) -> PrepareSummary:
    """Write the folder `data.path`: tokenizer, shards, indexes and dataset.json.

    The shards hold the text of data.source or, with task.kind, samples of that task. The folder appears when all files are
    written; a failure leaves an earlier folder unchanged. Progress is printed to stderr and the summary to stdout, followed
    by a warning if the held-out split is too small.

    Args:
        overwrite: replace an existing prepared folder.

    Raises:
        UserError: if the configuration is invalid, the source cannot be read or the folder cannot be written.
    """
    validate_model(config)
    validate_data(config)
    validate_task(config)
    data, target = config.data, Path(config.data.path)
    # Samples with the filler "repeated" need no text.
    reads_source = config.task.kind is None or config.task.filler == "text"
    source = DocumentSource(data.source, data.text_key, data.max_text_mb) if reads_source else None
    given = None if data.tokenizer is None else _load_given_tokenizer(Path(data.tokenizer), data.vocab_size)
    console = Console(file=sys.stderr)
    if source is not None and source.is_standard_library:
        console.print("Corpus: the source files of Python's standard library (data.source is stdlib)")
    try:
        with atomic_folder(target, overwrite) as folder, _progress(console) as progress:
            if given is None:
                texts: Iterable[str] = []
                if source is not None:
                    texts = (document.text for document in _track_documents(source, progress, "Training the tokenizer"))
                if config.task.kind is not None:
                    texts = chain(texts, task_texts(config.task))
                written = folder / SENTENCEPIECE_FILE
                train_tokenizer(texts, written, data.vocab_size)
            else:
                written = given.copy_to(folder)
            tokenizer = read_tokenizer(written)
            if source is None or config.task.kind is not None:
                samples = _samples(config, tokenizer, progress)
                write_task_shards(samples, config, tokenizer, folder, "repeated" if source is None else data.source)
            else:
                write_shards(
                    _track_documents(source, progress, "Writing shards"),
                    tokenizer,
                    folder,
                    source=data.source,
                    held_out_fraction=data.held_out_fraction,
                    shard_size_mb=data.shard_size_mb,
                )
    except OSError as error:
        raise UserError(
            f"data.path {target} cannot be written ({error.strerror or error}); free space or choose another path"
        ) from error
    summary = _summary(target, config.model.segment_length, source)
    print(summary)
    if (warning := held_out_warning(config)) is not None:
        print(warning, file=sys.stderr)
    return summary


def _samples(config: RunConfig, tokenizer: Tokenizer, progress: Progress) -> Iterator[tuple[str, Sample]]:
    """Yield (split, sample) for every sample of the task, and update a progress bar."""
    total = config.task.samples + config.task.held_out_samples
    line = progress.add_task("Writing samples", total=total, documents=0)
    done = 0
    for split in SPLITS:
        filler = make_filler(config, tokenizer, held_out=split == "held_out")
        for sample in split_samples(config, tokenizer, split, filler):
            yield split, sample
            done += 1
            progress.update(line, completed=done, documents=done)


def _load_given_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"data.vocab_size is {vocab_size}, but data.tokenizer {path} has {tokenizer.vocab_size} ids; set "
            f"data.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _track_documents(source: DocumentSource, progress: Progress, description: str) -> Iterator[Document]:
    """Yield the documents of the source, and update a progress bar."""
    task = progress.add_task(description, total=1.0, documents=0)
    for document in source:
        progress.update(task, completed=source.fraction_read, documents=source.documents)
        yield document
    progress.update(task, completed=1.0)


def _summary(folder: Path, segment_length: int, source: DocumentSource | None) -> PrepareSummary:
    manifest = load_manifest(folder)
    splits = {}
    for split in SPLITS:
        facts = manifest.splits[split]
        lengths = TokenDataset(folder, split).document_lengths
        splits[split] = SplitSummary(facts.documents, facts.characters, facts.tokens, padding_share(lengths, segment_length))
    return PrepareSummary(
        path=folder,
        vocab_size=manifest.vocab_size,
        segment_length=segment_length,
        skipped_empty=source.skipped_empty if source else 0,
        skipped_not_utf8=source.skipped_not_utf8 if source else 0,
        skipped_names=source.skipped_names if source else {},
        stopped_at_mb=source.max_text_bytes / 1e6 if source and source.stopped_early and source.max_text_bytes else None,
        splits=splits,
    )


def padding_share(document_lengths: np.ndarray, segment_length: int) -> float:
    """Return the fraction of token positions that are padding when every document starts at a segment start.

    Args:
        document_lengths: [documents] tokens of each document; a document of n tokens has n - 1 positions.
        segment_length: tokens per segment.
    """
    positions = document_lengths - 1
    slots = -(-positions // segment_length) * segment_length
    return float(1 - positions.sum() / slots.sum())
