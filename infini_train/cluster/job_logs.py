"""`infini-train logs`: print the log of a job, also while the job runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from infini_train.cluster import slurm
from infini_train.cluster.submission import RunFiles
from infini_train.runtime.errors import UserError

POLL_SECONDS = 0.5
STATE_EVERY = 10
"""Number of log polls between two queries of the job state, which put load on slurmctld."""


def newest_log(run_dir: Path) -> Path | None:
    """Return the log of a run's newest job. The log of an array task is in the array's folder."""
    files = RunFiles(run_dir)
    submission = files.submission()
    if submission is not None:
        job_id = submission.job_id
        paths = [files.logs / f"{job_id}.log", files.run_dir.parent / "logs" / f"{job_id}.log"]
        return next((path for path in paths if path.is_file()), None)
    logs = sorted(files.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def show_logs(run_dir: Path, lines: int, follow: bool) -> None:
    """Print the end of the newest log; with `follow`, keep printing until the job has ended and is not requeued.

    Raises:
        UserError: there is no log, or `run_dir` is an array instead of one of its runs.
    """
    if lines < 0:
        raise UserError(f"--lines is {lines}; use 0 or more")
    submission = RunFiles(run_dir).submission()
    if submission is not None and submission.tasks is not None:
        raise UserError(f"{run_dir} is an array of {submission.tasks} runs; name one, for example {run_dir / 'task_0'}")
    path = newest_log(run_dir)
    if path is None and not (follow and submission is not None):
        raise UserError(f"{run_dir} has no log yet; `infini-train status {quote(str(run_dir))}` shows the state of its job")
    while path is None:
        assert submission is not None
        _require_alive(submission.job_id, run_dir)
        time.sleep(POLL_SECONDS * STATE_EVERY)
        path = newest_log(run_dir)
    with path.open("rb") as file:
        _print(_last_lines(file, lines))
        while follow:
            # Query the state before reading, so that the last output before the end of the job is still read.
            alive = submission is not None and _is_alive(submission.job_id)
            for _ in range(STATE_EVERY):
                _print(file.read())
                if alive:
                    time.sleep(POLL_SECONDS)
            if not alive:
                return


def _is_alive(job_id: str) -> bool:
    state = slurm.job_state(job_id)
    return state is not None and state.active


def _require_alive(job_id: str, run_dir: Path) -> None:
    if not _is_alive(job_id):
        raise UserError(f"job {job_id} of {run_dir} ended and left no log")


def _last_lines(file: BinaryIO, count: int) -> bytes:
    """Return the last `count` lines, and leave the file position at the end of the file."""
    block = 8192
    end = file.seek(0, 2)
    start = end
    while True:
        start = max(0, start - block)
        file.seek(start)
        content = file.read(end - start)
        if start == 0 or content.count(b"\n") > count:
            break
    return b"".join(content.splitlines(keepends=True)[-count:]) if count else b""


def _print(content: bytes) -> None:
    sys.stdout.write(content.decode("utf-8", errors="replace"))
    sys.stdout.flush()
