"""Prepare a command that needs a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.checks import check_run_and_data, world_size
from infini_train.config import RunConfig


def with_model(
    run: RunConfig,
    arguments: Namespace,
    action: Callable[[Any, RunConfig, Path], Any],
    check: Callable[[RunConfig], None] = check_run_and_data,
) -> int:
    """Check the run, find its checkpoint, and call `action` with the module of evaluation commands, run and checkpoint."""
    from infini_train.runtime import platform

    platform.install()
    from infini_train.evaluation import commands
    from infini_train.runtime.files import check_writable

    run = commands.inference_layout(run, world_size())
    check(run)
    checkpoint = commands.find_checkpoint(run, arguments.from_checkpoint)
    # run_dir may not exist yet: --from_checkpoint can name a checkpoint of another run.
    check_writable(Path(run.run_dir), f"run_dir {run.run_dir}")
    action(commands, run, checkpoint)
    return 0


def add_checkpoint_option(parser: ArgumentParser) -> None:
    """Add --from_checkpoint."""
    parser.add_argument(
        "--from_checkpoint",
        type=str | None,
        default=None,
        help="folder step_XXXXXXXX, or a file of `checkpoint consolidate`; default: the newest checkpoint of the run",
    )
