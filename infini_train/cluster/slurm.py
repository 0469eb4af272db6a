"""SLURM's own commands, and what they say about a job."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infini_train.runtime.errors import UserError

WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
"""States of a job that is in the queue, held or not."""
ACTIVE_STATES = WAITING_STATES | {
    *("CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING"),
}
"""States of a job that runs or will run, of those that squeue(1) lists."""


@dataclass(frozen=True)
class JobState:
    """A job as SLURM knows it now."""

    job_id: str
    state: str
    fields: dict[str, str]
    """Everything that `scontrol show job` says."""

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
    """Whether SLURM's commands are on this machine."""
    return shutil.which("scontrol") is not None


OF_THE_CLUSTER = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
"""Variables that tell SLURM's commands which cluster to speak to, and not what job they are in."""


def call(*command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Output of one of SLURM's commands.

    Args:
        environment: this process's by default.

    Raises:
        UserError: it is not on this machine, or refuses.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on this machine; call this where SLURM's commands are (a login node)") from error
    if result.returncode:
        raise UserError(f"{command[0]}: {' '.join((result.stderr or result.stdout).split())}")
    return result.stdout


def submit_script(script: Path) -> str:
    """The id of a job submitted from the script's folder, where its log folder lies.

    A job inherits the environment of `sbatch`. Called inside of another job, an interactive one for example, that would be that
    job's too: its array, its restarts, its memory and its binding to cores.

    Raises:
        UserError: SLURM refuses it.
    """
    environment = {name: value for name, value in os.environ.items() if name in OF_THE_CLUSTER or not name.startswith("SLURM_")}
    outside = environment if "SLURM_JOB_ID" in os.environ else None
    return call("sbatch", "--parsable", script.name, cwd=script.parent, environment=outside).strip().split(";")[0]


def job_state(job_id: str) -> JobState | None:
    """A job's state; None if SLURM does not know it (any more). Of an array it is that of a task that runs or will run, if any.

    Raises:
        UserError: SLURM cannot be asked.
    """
    try:
        shown = call("scontrol", "show", "job", "--oneliner", job_id)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job_id)
    records = [_record(job_id, line) for line in shown.splitlines() if line.strip()]
    return next((each for each in records if each.active), records[0] if records else None)


def _record(job_id: str, line: str) -> JobState:
    # A path may hold blanks, and then anything; paths come last.
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


def _accounted(job_id: str) -> JobState | None:
    """What SLURM's accounting remembers of a job, where a cluster has it."""
    try:
        lines = call("sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State").splitlines()
    except UserError:
        return None
    return JobState(job_id, lines[0].split()[0], {}) if lines and lines[0].strip() else None
