"""Arguments and output of `submit`, `status`, `cancel` and `logs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from jsonargparse import ArgumentParser, Namespace

from infini_train.cluster.cancel_job import cancel
from infini_train.cluster.job_logs import show_logs
from infini_train.cluster.job_status import status_lines
from infini_train.cluster.submit_job import SubmitOptions, prepare_job, submit
from infini_train.config import RunConfig
from infini_train.runtime.errors import UserError


def add_submit_arguments(command: ArgumentParser) -> None:
    """Options of `submit`, beside the run's own."""
    command.add_argument("--profile", type=str, required=True, help="file of slurm/profiles/, by name, or a path to one")
    command.add_argument("--nodes", type=int, default=1, help="nodes of the job")
    command.add_argument("--time", type=str | None, default=None, help="time limit of one job; the profile's by default")
    command.add_argument("--name", type=str | None, default=None, help="job name; the name of run_dir by default")
    command.add_argument(
        "--sweep",
        type=str,
        action="append",
        default=[],
        help="KEY=VALUE,VALUE: an array with a run for each; several make all combinations",
    )
    command.add_argument("--max_parallel", type=int, default=0, help="runs of an array at the same time; 0 sets no limit")
    command.add_argument("--exclude", type=str | None, default=None, help="nodes to leave out, comma-separated")
    command.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script and submit nothing")


def add_run_argument(name: str, command: ArgumentParser) -> None:
    """Options of `status`, `cancel` and `logs`."""
    command.add_argument("run", type=str, metavar="RUN", help="folder of the run")
    if name == "cancel":
        command.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    if name == "logs":
        command.add_argument("--follow", action="store_true", help="go on until the job has ended")
        command.add_argument("--lines", type=int, default=50, help="lines to begin with")


def run_submit(run: RunConfig, arguments: Namespace, check: Callable[[RunConfig], None]) -> int:
    """Submit, or print the script with --dry-run.

    Args:
        check: raises where a run of the job cannot start, above all without its data; a dry run only says so.
    """
    options = SubmitOptions(
        profile=arguments.profile,
        nodes=arguments.nodes,
        time_limit=arguments.time,
        name=arguments.name,
        sweeps=arguments.sweep,
        max_parallel=arguments.max_parallel,
        exclude=arguments.exclude,
    )
    prepared = prepare_job(run, options)
    if arguments.dry_run:
        try:
            for each in prepared.runs:
                check(each)
        except UserError as error:
            print(f"infini-train: warning: this job would not be submitted yet: {error}", file=sys.stderr)
        print(prepared.script, end="")
        return 0
    for each in prepared.runs:
        check(each)
    submission = submit(prepared, arguments.profile)
    run_dir = prepared.job.run_dir
    runs = f" for {submission.tasks} runs" if submission.tasks is not None else ""
    print(f"job {submission.job_id}{runs}: {submission.nodes} nodes, {submission.processes} processes; {run_dir}")
    if prepared.expected is not None:
        print(f"planned: {prepared.expected}")
    print(f"infini-train status {quote(str(run_dir))}")
    return 0


def run_status(run_dir: Path) -> int:
    print(*status_lines(run_dir), sep="\n")
    return 0


def run_cancel(run_dir: Path, *, now: bool) -> int:
    print(*cancel(run_dir, now=now), sep="\n")
    return 0


def run_logs(run_dir: Path, *, lines: int, follow: bool) -> int:
    show_logs(run_dir, lines, follow)
    return 0
