"""Size check of the held-out split, so that a split that is too small is reported before training starts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.manifest import SPLITS, Manifest, load_manifest

MIN_TOKENS = 50_000
"""Tokens below which the mean loss is too uncertain.

The loss of one token has a standard deviation of about 3 nats, so the mean of 50,000 tokens has one of about 0.01 or more.
"""
MARGIN = 1.25
"""Safety factor for the recommended held_out_fraction.

A hash of its text assigns each document to a split, so the held-out split can be smaller than the fraction.
"""
MAX_FRACTION = 0.5
"""Largest held_out_fraction that the warning recommends."""
ATTENTION_WITHOUT_MEMORY = ("local", "full")
"""Values of model.attention that have no memory, so that documents of one segment are enough."""


def held_out_warning(run: RunConfig) -> str | None:
    """Return a warning of one line, with the remedy, if the held-out split of `data.path` is too small for this run.

    Return None if the split is large enough, and for the samples of a task, whose number and lengths the user has configured.
    """
    manifest = load_manifest(Path(run.data.path))
    if manifest.task is not None:
        return None
    lengths = {split: _document_lengths(run, manifest, split) for split in SPLITS}
    held_out, both = lengths["held_out"], np.concatenate(list(lengths.values()))
    found: list[str] = []
    shares: list[float] = []  # the fraction of the text that would fix each problem
    if len(held_out) < run.training.rows:
        found.append(f"fewer documents ({len(held_out)}) than training.rows ({run.training.rows}), so that rows stay empty")
        shares.append(run.training.rows / len(both))
    if (tokens := int(held_out.sum())) < MIN_TOKENS:
        found.append(f"{tokens:,} tokens, and below {MIN_TOKENS:,} a loss is uncertain by more than 0.01")
        shares.append(MIN_TOKENS / int(both.sum()))
    two_segments = 2 * run.model.segment_length + 1  # the last token is a target only
    if run.model.attention not in ATTENTION_WITHOUT_MEMORY and not (held_out > two_segments).any():
        found.append(f"no document of more than two segments of {run.model.segment_length}, so that the memory is hardly read")
        shares.append(1 / max(1, int((both > two_segments).sum())))
    if not found:
        return None
    share = MARGIN * max(*shares, run.data.held_out_fraction)
    remedy = "give more text or longer documents"
    if share <= MAX_FRACTION:
        remedy = f"set data.held_out_fraction to {_rounded_up(share):g}"
    return (
        f"warning: the held-out split of data.path {run.data.path} is too small: {'; '.join(found)}; {remedy}, and run "
        "`infini-train prepare --overwrite` before training"
    )


def _document_lengths(run: RunConfig, manifest: Manifest, split: str) -> np.ndarray:
    """Return the document lengths from the index; the shards may be missing or damaged."""
    shards = frozenset(shard.file for shard in manifest.splits[split].shards)
    return TokenDataset(Path(run.data.path), split, shards).document_lengths


def _rounded_up(share: float) -> float:
    """Round up to two significant digits."""
    scale = 10 ** (1 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale
