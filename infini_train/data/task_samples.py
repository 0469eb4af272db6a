"""Samples of a task as a data folder with loss weights. Each sample is one document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from infini_train.config import RunConfig, TaskConfig
from infini_train.data.documents import Document, DocumentSource
from infini_train.data.manifest import SPLITS, Manifest, token_format
from infini_train.data.shards import SplitWriter, finish_shards, text_hash_fraction
from infini_train.runtime.errors import UserError
from infini_train.tasks import Purpose, RepeatedFiller, Sample, Task, TextFiller, training_placement
from infini_train.tasks.draws import Draws, sample_seed
from infini_train.tasks.filler import SENTENCES
from infini_train.tasks.task import draw_story
from infini_train.tokenizers.tokenizer import Tokenizer

FILLER_TOKENS = 1 << 24
"""Maximum number of tokens of real text that are kept in memory as filler."""
TOKENIZER_STORIES = 2000
"""Stories from which the tokenizer is trained."""
PURPOSES = {"train": Purpose.TRAIN, "held_out": Purpose.HELD_OUT}


def task_texts(task: TaskConfig) -> Iterator[str]:
    """Yield texts of the task for tokenizer training: stories that are in no split, and the filler sentences."""
    for number in range(TOKENIZER_STORIES):
        story = draw_story(task, Draws(sample_seed(task.seed, Purpose.TOKENIZER, number)))
        needles = "".join([*story.before, *story.anywhere, story.needle])
        yield f"{story.introduction}{SENTENCES} {needles}{SENTENCES} {story.question}{story.answer}"


def text_filler(documents: Iterable[Document], tokenizer: Tokenizer, held_out: bool, held_out_fraction: float) -> TextFiller:
    """Build filler from the documents of one split of a source, joined one after another, at most FILLER_TOKENS tokens.

    Raises:
        UserError: if the split is empty.
    """
    found: list[np.ndarray] = []
    remaining = FILLER_TOKENS
    for document in documents:
        if (text_hash_fraction(document.text) < held_out_fraction) != held_out:
            continue
        tokens = tokenizer.encode(document.text + "\n\n")[:remaining]
        found.append(np.array(tokens, dtype=np.int32))
        remaining -= len(tokens)
        if remaining == 0:
            break
    if not found:
        raise UserError(
            f"task.filler is text, but no document of data.source is in the {SPLITS[held_out]} split; give more documents, or "
            "change data.held_out_fraction"
        )
    return TextFiller(np.concatenate(found))


def make_filler(run: RunConfig, tokenizer: Tokenizer, held_out: bool) -> TextFiller:
    """Build the configured filler: the paper's sentences, or the documents of one split of data.source."""
    if run.task.filler == "repeated":
        return RepeatedFiller(tokenizer)
    source = DocumentSource(run.data.source, run.data.text_key, run.data.max_text_mb)
    return text_filler(source, tokenizer, held_out, run.data.held_out_fraction)


def split_samples(run: RunConfig, tokenizer: Tokenizer, split: str, filler: TextFiller) -> Iterator[Sample]:
    """Yield the samples of a split. Both splits use the configured lengths and placements of the needle."""
    config = run.task
    task = Task(config, tokenizer, filler)
    placement = training_placement(config.late_share, config.border_share, config.own_segment_share, run.model.segment_length)
    for number in range(config.samples if split == "train" else config.held_out_samples):
        # The length has its own seed, so that it does not depend on the sample's draws.
        draws = Draws(sample_seed(config.seed, PURPOSES[split], number, 1))
        length = task_length(config, draws.fraction())
        fewest = config.min_keys or config.keys
        keys = range(draws.between(fewest, config.keys), fewest - 1, -1)
        yield task.sample(config.seed, PURPOSES[split], (number, 0), length, placement, config.questions, keys)


def task_length(config: TaskConfig, fraction: float) -> int:
    """Return a quantile of the configured length distribution (inverse of its cumulative distribution function).

    Args:
        fraction: cumulative probability in [0, 1).

    Returns:
        Tokens from the begin token to the last token of the answer.
    """
    low, high = config.min_tokens, config.max_tokens + 1
    if config.length_distribution == "uniform":
        length = low + fraction * (high - low)
    elif config.length_distribution == "log_uniform":
        length = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    else:  # density 1 / length²
        length = low * high / (high - fraction * (high - low))
    return max(low, min(high - 1, int(length)))  # clamp rounding errors


def write_task_shards(
    samples: Iterable[tuple[str, Sample]], run: RunConfig, tokenizer: Tokenizer, folder: Path, source: str
) -> Manifest:
    """Write each sample as a document that ends with the end token, then the indexes and `dataset.json`.

    A sample of n tokens has n positions. The target of the last position is the end token.

    Args:
        samples: pairs (split, sample), with at least one sample for each split.
        source: recorded in `dataset.json`.
    """
    token_type, member = token_format(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder, split, int(run.data.shard_size_mb * 1e6), member) for split in SPLITS}
    try:
        for split, sample in samples:
            tokens = np.append(sample.tokens, tokenizer.eos_id).astype(token_type)
            weights = np.zeros(len(tokens), dtype=np.uint8)
            weights[sample.answer_start : sample.length] = sample.scored
            document = Document(tokenizer.decode(tokens.tolist()), f"{sample.facts['task']}:{writers[split].documents}")
            writers[split].write(document, tokens, weights)
    finally:
        for writer in writers.values():
            writer.close()
    levels = [float(np.float32(weight)) for weight in (run.task.other_weight, run.task.answer_weight)]
    return finish_shards(folder, tokenizer, source, writers, weight_levels=levels, task=asdict(run.task))
