"""`infini-train logs`: show what the job of a run prints."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cluster.job_logs import show_logs


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", type=str, metavar="RUN", help="folder of the run")
    parser.add_argument("--follow", action="store_true", help="continue until the job has ended")
    parser.add_argument("--lines", type=int, default=50, help="lines to begin with")


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    show_logs(Path(arguments.run), arguments.lines, arguments.follow)
    return 0
