"""Checks of a run before it takes resources, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

from infini_train.config import RunConfig
from infini_train.config.validation import validate
from infini_train.runtime.errors import UserError


def world_size() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_run_and_data(run: RunConfig) -> None:
    """Check values, layout and data files, without importing torch."""
    from infini_train.data.dataset import check_dataset

    validate(run, world_size())
    check_dataset(run)


def check_initial_weights_of(run: RunConfig) -> None:
    """Check that a run without a checkpoint can start from `training.initial_weights`."""
    if run.training.initial_weights is None:
        return
    from infini_train.checkpoint.compatibility import check_initial_weights
    from infini_train.checkpoint.folder import list_checkpoints
    from infini_train.data.manifest import load_manifest
    from infini_train.planning.parameter_counts import model_parameters

    if not list_checkpoints(Path(run.run_dir)):
        check_initial_weights(run, load_manifest(Path(run.data.path)).tokenizer_fingerprint, model_parameters(run))


def check_run_and_tokenizer(run: RunConfig) -> None:
    """Check a command that needs only the tokenizer in data.path, not the shards."""
    from infini_train.tokenizers.tokenizer_file import tokenizer_of

    validate(run, world_size())
    tokenizer = tokenizer_of(run.data.path)
    if tokenizer.vocab_size != run.data.vocab_size:
        raise UserError(
            f"data.vocab_size is {run.data.vocab_size}, but {tokenizer.path} has {tokenizer.vocab_size} tokens; set "
            f"data.vocab_size to {tokenizer.vocab_size}"
        )


def check_run_and_held_out(run: RunConfig) -> None:
    """Check `generate` without a prompt, which takes its prompt from the held-out split."""
    from infini_train.data.dataset import check_dataset

    check_run_and_tokenizer(run)
    try:
        check_dataset(run, ("held_out",))
    except UserError as error:
        raise UserError(f"{error}; or give a prompt with --prompt, which needs no shards in {run.data.path}") from error
