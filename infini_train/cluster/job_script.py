"""Render the job script from slurm/pretrain.sbatch.j2.

All user input (paths, names, variables) enters the script through the filter `quote`, so that it cannot become shell code.
Options in #SBATCH lines cannot be quoted; `cluster_profile.validate_directive` checks them instead.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infini_train.cluster.cluster_profile import ClusterProfile, time_seconds, validate_directive
from infini_train.runtime.errors import UserError

PROJECT = Path(__file__).parents[2]
TEMPLATE = "pretrain.sbatch.j2"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of one job that do not come from the cluster profile."""

    run_dir: Path
    """Absolute path of the folder of the run, or of all runs of an array."""
    name: str
    """Job name that SLURM displays."""
    nodes: int
    time_limit: str
    submit_dir: Path
    """Folder in which `submit` was called. Relative paths in the configuration start there."""
    python: str
    tasks: int | None = None
    """Number of runs of an array, in run_dir/task_0 and so on; None for a single run."""
    max_parallel: int = 0
    """Maximum number of array tasks at the same time; 0 sets no limit."""
    exclude: str | None = None
    """Nodes to exclude, comma-separated."""


def job_name(run_dir: Path) -> str:
    """Derive a job name from a folder's name, with a dash for characters that SLURM or a shell would interpret."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.name).lstrip("-.") or "pretrain"


def validate_job(job: Job, profile: ClusterProfile) -> None:
    """Refuse a job whose options SLURM would misread, or that has no time to save a checkpoint.

    Raises:
        UserError: the message names the option, its value and the remedy.
    """
    validate_directive("--name", job.name)
    validate_directive("--exclude", job.exclude, re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*"))
    if job.nodes < 1:
        raise UserError(f"--nodes is {job.nodes}; it must be at least 1")
    if job.max_parallel < 0:
        raise UserError(f"--max_parallel is {job.max_parallel}; use 0 for no limit")
    seconds = time_seconds("--time", job.time_limit)
    if seconds <= profile.signal_seconds:
        raise UserError(
            f"--time is {job.time_limit}, no longer than signal_seconds of the profile ({profile.signal_seconds}), the "
            "time to save before the limit; give more time or lower signal_seconds"
        )
    # SLURM expands % and \ in names of output files, and an #SBATCH option ends at the end of its line.
    wrong = next((character for character in str(job.run_dir) if character in "%\\" or not character.isprintable()), None)
    if wrong is not None:
        raise UserError(f"run_dir {str(job.run_dir)!r} contains {wrong!r}, which SLURM would interpret; give it another name")


def render_job(job: Job, profile: ClusterProfile) -> str:
    """Render the script for sbatch.

    Raises:
        UserError: see `validate_job`.
    """
    validate_job(job, profile)
    environment = Environment(
        loader=FileSystemLoader(PROJECT / "slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(TEMPLATE).render(job=job, profile=profile, project=PROJECT, variables=profile.variables())
