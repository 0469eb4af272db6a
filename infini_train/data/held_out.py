"""Warn if a held-out split is too small to measure, before training depends on it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.manifest import SPLITS, Manifest, load_manifest

FEWEST_TOKENS = 50_000
"""The loss of a token has a deviation of about 3 nats, so the mean over fewer tokens is uncertain by more than 0.01."""
MARGIN = 1.25
"""Safety factor of the advised fraction: a hash of its text assigns each document, so the size of a split varies."""
LARGEST_FRACTION = 0.5
READS_NO_MEMORY = ("local", "full")
"""Values of model.attention without a memory across segments."""


def held_out_warning(run: RunConfig) -> str | None:
    """Return a warning with a remedy if the held-out split of `data.path` is too small for this run, else None.

    Samples of a task have the number and length that the task section sets, so there is no warning for them.
    """
    manifest = load_manifest(Path(run.data.path))
    if manifest.task is not None:
        return None
    lengths = {split: _document_lengths(run, manifest, split) for split in SPLITS}
    held_out, both = lengths["held_out"], np.concatenate(list(lengths.values()))
    found: list[str] = []
    shares: list[float] = []
    """Shares of the text that would be enough."""
    if len(held_out) < run.training.rows:
        found.append(f"fewer documents ({len(held_out)}) than training.rows ({run.training.rows}), so that rows stay empty")
        shares.append(run.training.rows / len(both))
    if (tokens := int(held_out.sum())) < FEWEST_TOKENS:
        found.append(f"{tokens:,} tokens, and below {FEWEST_TOKENS:,} a loss is uncertain by more than 0.01")
        shares.append(FEWEST_TOKENS / int(both.sum()))
    two_segments = 2 * run.model.segment_length + 1  # the last token is only a target
    if run.model.attention not in READS_NO_MEMORY and not (held_out > two_segments).any():
        found.append(f"no document of more than two segments of {run.model.segment_length}, so that memory is hardly read")
        shares.append(1 / max(1, int((both > two_segments).sum())))
    if not found:
        return None
    share = MARGIN * max(*shares, run.data.held_out_fraction)
    remedy = "give more text or longer documents"
    if share <= LARGEST_FRACTION:
        remedy = f"set data.held_out_fraction to {_rounded_up(share):g}"
    return (
        f"warning: the held-out split of data.path {run.data.path} measures little: {'; '.join(found)}; {remedy}, and run "
        "`infini-train prepare --overwrite` before training"
    )


def _document_lengths(run: RunConfig, manifest: Manifest, split: str) -> np.ndarray:
    """Read the lengths from the index, without the shards."""
    shards = frozenset(shard.file for shard in manifest.splits[split].shards)
    return TokenDataset(Path(run.data.path), split, shards).document_lengths


def _rounded_up(share: float) -> float:
    """Round up to two significant digits."""
    scale = 10 ** (1 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale
