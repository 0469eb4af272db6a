"""Check the shards once before training, so that all ranks agree on the readable ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset, shard_damage
from infini_train.data.manifest import REMEDY, SPLITS, load_manifest
from infini_train.runtime.errors import UserError


def open_training_data(run: RunConfig, say: Callable[[str], None]) -> TokenDataset:
    """Check all shards of both splits and open the training split. A collective over all ranks, which divide the shards.

    Args:
        say: called on every rank with one line for each training shard that is left out, and one line with their number.

    Raises:
        UserError: a held-out shard is missing or damaged, or a training shard is and data.on_bad_shard is fatal.
    """
    folder = Path(run.data.path)
    manifest = load_manifest(folder)
    shards = [(split, shard) for split in SPLITS for shard in manifest.splits[split].shards]
    damage = {
        (split, shard.file): found
        for split, shard in shards[dist.get_rank() :: dist.get_world_size()]
        if (found := shard_damage(folder, shard, checksum=run.data.verify_checksums)) is not None
    }
    everywhere: list[dict[tuple[str, str], str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, damage)
    bad = dict(sorted(item for of_rank in everywhere for item in of_rank.items()))
    fatal = [line for (split, _), line in bad.items() if split != "train" or run.data.on_bad_shard == "fatal"]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        skip = ", or set data.on_bad_shard to skip" if all(split == "train" for split, _ in bad) else ""
        raise UserError(f"{fatal[0]}{more}; {REMEDY}{skip}")
    dataset = TokenDataset(folder, "train", frozenset(file for _, file in bad))
    for line in bad.values():
        say(f"left out: {line}")
    if bad:
        lost = int((~dataset.available).sum())
        say(
            f"data.on_bad_shard is skip: {len(bad)} of {len(manifest.splits['train'].shards)} training shards are left out, "
            f"with {lost} of {dataset.num_documents} documents"
        )
    return dataset
