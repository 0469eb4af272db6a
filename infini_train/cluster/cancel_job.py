"""`infini-train cancel`: save a checkpoint, then end the job."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from infini_train.cluster import slurm
from infini_train.cluster.submission import RunFiles
from infini_train.runtime.errors import UserError


def cancel(run_dir: Path, *, now: bool) -> list[str]:
    """Cancel the job of a run, or all of an array.

    Signal a running job to save a checkpoint and exit. Its script finds the file `cancelled` and does not requeue the job.
    Remove a pending job from the queue.

    Args:
        now: end the job immediately, without a checkpoint.

    Returns:
        One line for each job that says what was done.

    Raises:
        UserError: the run has no job, the file `cancelled` cannot be written, or SLURM reports an error.
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
    # Create the file before calling scancel, so that a job that starts or is requeued in the meantime sees it.
    try:
        files.cancelled.touch()
    except OSError as error:
        raise UserError(
            f"{files.cancelled} cannot be written ({error.strerror or error}), so the job would be requeued; "
            f"`scancel {submission.job_id}` ends it, with a checkpoint only if saving takes no longer than KillWait"
        ) from error
    if state.running and not now:
        slurm.call("scancel", "--batch", "--signal=USR1", submission.job_id)
        status_command = f"infini-train status {quote(str(run_dir))}"
        return [f"job {submission.job_id} saves and ends; `{status_command}` shows its state (--now does not wait)"]
    slurm.call("scancel", submission.job_id)
    return [f"job {submission.job_id} is cancelled"]
