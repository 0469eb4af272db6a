"""Call SLURM's commands and parse the state of a job."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infini_train.runtime.errors import UserError

WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
"""States of a job in the queue, including held jobs."""
ACTIVE_STATES = WAITING_STATES | {
    *("CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING"),
}
"""States, as listed in squeue(1), of a job that runs or will run."""


@dataclass(frozen=True)
class JobState:
    """The current state of a job."""

    job_id: str
    state: str
    fields: dict[str, str]
    """All fields that `scontrol show job` prints."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE_STATES

    @property
    def running(self) -> bool:
        return self.state in ("RUNNING", "SIGNALING")

    @property
    def pending(self) -> bool:
        return self.state in WAITING_STATES


def available() -> bool:
    """Return whether SLURM's commands are installed on this machine."""
    return shutil.which("scontrol") is not None


CLUSTER_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
"""SLURM variables that select the cluster, in contrast to those that describe the current job."""


def call(*command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a SLURM command and return its standard output.

    Args:
        environment: environment variables; default: those of this process.

    Raises:
        UserError: the command is not installed on this machine, or fails.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not on this machine; run this where SLURM's commands are, such as a login node"
        ) from error
    if result.returncode:
        raise UserError(f"{command[0]}: {' '.join((result.stderr or result.stdout).split())}")
    return result.stdout


def submit_script(script: Path) -> str:
    """Submit a script from its own folder, which contains the log folder, and return the job id.

    A job inherits the environment of `sbatch`. Inside another job, for example an interactive one, that environment describes
    the other job: its array, restarts, memory and core binding. Remove these variables.

    Raises:
        UserError: SLURM refuses the job.
    """
    environment = {
        name: value for name, value in os.environ.items() if name in CLUSTER_VARIABLES or not name.startswith("SLURM_")
    }
    without_job = environment if "SLURM_JOB_ID" in os.environ else None
    return call("sbatch", "--parsable", script.name, cwd=script.parent, environment=without_job).strip().split(";")[0]


def job_state(job_id: str) -> JobState | None:
    """Return the state of a job, or None if SLURM has no record of it.

    For an array, return the state of a task that runs or will run, if there is one.

    Raises:
        UserError: SLURM's commands are missing or fail.
    """
    try:
        shown = call("scontrol", "show", "job", "--oneliner", job_id)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _state_from_accounting(job_id)
    records = [_record(job_id, line) for line in shown.splitlines() if line.strip()]
    return next((each for each in records if each.active), records[0] if records else None)


def _record(job_id: str, line: str) -> JobState:
    # A path may contain blanks and text that looks like a field. Paths come last, so keep the first value of each key.
    fields: dict[str, str] = {}
    last = ""
    for word in line.split():
        key, separator, value = word.partition("=")
        if separator and key[:1].isupper():
            fields.setdefault(key, value)
            last = key
        elif last:
            fields[last] += f" {word}"
    return JobState(job_id, fields.get("JobState", "UNKNOWN"), fields)


def _state_from_accounting(job_id: str) -> JobState | None:
    """Return the state of a job from SLURM's accounting, or None if the cluster has none."""
    try:
        lines = call("sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State").splitlines()
    except UserError:
        return None
    return JobState(job_id, lines[0].split()[0], {}) if lines and lines[0].strip() else None
