"""`infini-train logs`: print the log of a run's job."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cluster.job_logs import show_logs


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", type=str, metavar="RUN", help="folder of the run")
    parser.add_argument("--follow", action="store_true", help="continue until the job has ended")
    parser.add_argument("--lines", type=int, default=50, help="number of lines to print first")


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    show_logs(Path(arguments.run), arguments.lines, arguments.follow)
    return 0
