"""`infini-train submit`: submit a run to SLURM."""

from __future__ import annotations

import sys
from shlex import quote

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.checks import check_initial_weights_of
from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.cluster.submit_job import SubmitOptions, prepare_job, submit
from infini_train.config import RunConfig
from infini_train.runtime.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    parser.add_argument("--profile", type=str, required=True, help="profile of slurm/profiles/ by name, or the path of a file")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--time", type=str | None, default=None, help="time limit of one job; default: the profile's")
    parser.add_argument("--name", type=str | None, default=None, help="job name; default: the name of run_dir")
    parser.add_argument(
        "--sweep",
        type=str,
        action="append",
        default=[],
        help="KEY=VALUE,VALUE: job array with one run per value; repeat the option for all combinations",
    )
    parser.add_argument(
        "--max_parallel", type=int, default=0, help="maximum number of array runs at the same time; 0 sets no limit"
    )
    parser.add_argument("--exclude", type=str | None, default=None, help="nodes to exclude, comma-separated")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script and submit nothing")
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Submit the job, or print its script with --dry-run. A dry run reports missing data as a warning."""
    options = SubmitOptions(
        profile=arguments.profile,
        nodes=arguments.nodes,
        time_limit=arguments.time,
        name=arguments.name,
        sweeps=arguments.sweep,
        max_parallel=arguments.max_parallel,
        exclude=arguments.exclude,
    )
    prepared = prepare_job(run_config(arguments), options)
    if arguments.dry_run:
        try:
            for each in prepared.runs:
                _check(each)
        except UserError as error:
            print(f"infini-train: warning: this job would not be submitted yet: {error}", file=sys.stderr)
        print(prepared.script, end="")
        return 0
    for each in prepared.runs:
        _check(each)
    submission = submit(prepared, arguments.profile)
    run_dir = prepared.job.run_dir
    runs = f" for {submission.tasks} runs" if submission.tasks is not None else ""
    print(f"job {submission.job_id}{runs}: {submission.nodes} nodes, {submission.processes} processes; {run_dir}")
    if prepared.expected is not None:
        print(f"planned: {prepared.expected}")
    print(f"infini-train status {quote(str(run_dir))}")
    return 0


def _check(run: RunConfig) -> None:
    from infini_train.data.dataset import check_dataset

    check_dataset(run)
    check_initial_weights_of(run)
