"""`infini-train cancel`: end the job of a run after a checkpoint."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cluster.cancel_job import cancel


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", type=str, metavar="RUN", help="folder of the run")
    parser.add_argument("--now", action="store_true", help="end the job at once, without a checkpoint")


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    print(*cancel(Path(arguments.run), now=arguments.now), sep="\n")
    return 0
