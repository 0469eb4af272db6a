"""Ends a job: saved first, unless it is to be at once."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from infini_train.cluster import slurm
from infini_train.cluster.submission import RunFiles
from infini_train.runtime.errors import UserError


def cancel(run_dir: Path, *, now: bool) -> list[str]:
    """Cancel the job of a run, or all of an array.

    A running job is told to save and to end; its script sees the file `cancelled` and does not requeue it. A job that waits
    is taken from the queue.

    Args:
        now: do not wait for a checkpoint.

    Returns:
        What was done, a line for each job.

    Raises:
        UserError: there is no job, or SLURM refuses.
    """
    files = RunFiles(run_dir)
    submission = files.submission()
    if submission is None:
        raise UserError(f"{run_dir} has no job: job/submission.json is missing; name the run_dir of a submitted run")
    if submission.tasks is not None:
        return [line for number in range(submission.tasks) for line in cancel(files.task(number).run_dir, now=now)]
    state = slurm.job_state(submission.job_id)
    if state is None or not state.active:
        return [f"job {submission.job_id} is not running any more" + (f": {state.state}" if state else "")]
    # Before SLURM is told: a job that starts or is requeued meanwhile sees it.
    try:
        files.cancelled.touch()
    except OSError as error:
        raise UserError(
            f"{files.cancelled} cannot be written ({error.strerror or error}), without which the job would be requeued; "
            f"`scancel {submission.job_id}` ends it, with a checkpoint only if that takes no longer than KillWait"
        ) from error
    if state.running and not now:
        slurm.call("scancel", "--batch", "--signal=USR1", submission.job_id)
        look = f"infini-train status {quote(str(run_dir))}"
        return [f"job {submission.job_id} saves and ends; `{look}` shows when (--now does not wait)"]
    slurm.call("scancel", submission.job_id)
    return [f"job {submission.job_id} is cancelled"]
