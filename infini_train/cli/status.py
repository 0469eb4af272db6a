"""`infini-train status`: show the state of a run and its job."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cluster.job_status import status_lines


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", type=str, metavar="RUN", help="folder of the run")


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    print(*status_lines(Path(arguments.run)), sep="\n")
    return 0
