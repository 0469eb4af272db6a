"""`infini-train status`: the job's state, the progress of the run, and its latest events."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from infini_train.checkpoint.folder import list_checkpoints
from infini_train.cluster import slurm
from infini_train.cluster.job_logs import newest_log
from infini_train.cluster.submission import RunFiles, Submission
from infini_train.config import read_steps
from infini_train.runtime.errors import UserError

EVENTS = 5
"""Number of history lines to show."""
TAIL_BYTES = 65536
"""Bytes to read from the end of metrics.jsonl."""


def status_lines(run_dir: Path) -> list[str]:
    """Return the status of a run, or one line for each run of an array.

    Raises:
        UserError: the folder is not a run directory, or SLURM's commands fail.
    """
    files = RunFiles(run_dir)
    submission = files.submission()
    if submission is not None and submission.tasks is not None:
        lines = [f"array       {submission.job_id}, {submission.tasks} runs, submitted {submission.submitted}"]
        for number in range(submission.tasks):
            task = files.task(number)
            lines.append(
                f"task_{number:<6} {_job_summary(task.submission())}; {_progress_summary(task.run_dir) or 'no step yet'}"
            )
        return lines
    progress = _progress_summary(run_dir)
    if submission is None and progress is None:
        raise UserError(f"{run_dir} has neither job/submission.json nor metrics.jsonl, so it is not a run; name a run_dir")
    lines = [f"run         {run_dir}", f"job         {_job_summary(submission)}", f"progress    {progress or 'no step yet'}"]
    if checkpoints := list_checkpoints(run_dir):
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(checkpoints[-1].stat().st_mtime))
        lines.append(f"checkpoint  {checkpoints[-1].name}, {written}")
    if (excluded := files.job / "excluded").is_file():
        lines.append(f"excluded    {', '.join(sorted(set(excluded.read_text(encoding='utf-8', errors='replace').split())))}")
    if (log := newest_log(run_dir)) is not None:
        lines.append(f"log         {log}")
    return lines + [f"            {event}" for event in files.history()[-EVENTS:]]


def _job_summary(submission: Submission | None) -> str:
    if submission is None:
        return "none: not started by `infini-train submit`"
    head = f"{submission.job_id}"
    if not slurm.available():
        return f"{head}, submitted {submission.submitted} (SLURM's commands are not on this machine)"
    state = slurm.job_state(submission.job_id)
    if state is None:
        return f"{head}, submitted {submission.submitted}, ended (SLURM has no further record of it)"
    fields = state.fields
    details = [f"{head} {state.state}"]
    if state.pending and fields.get("Reason", "None") != "None":
        details.append(f"reason {fields['Reason']}")
    if fields.get("NodeList", "(null)") != "(null)":
        details.append(f"on {fields['NodeList']}")
    if state.running:
        details.append(f"{fields.get('RunTime')} of {fields.get('TimeLimit')}")
    if int(fields.get("Restarts", "0")):
        details.append(f"requeued {fields['Restarts']} times")
    if not state.active and "ExitCode" in fields:
        details.append(f"exit code {fields['ExitCode'].partition(':')[0]}")
    return ", ".join(details)


def _progress_summary(run_dir: Path) -> str | None:
    record = _last_record(run_dir / "metrics.jsonl")
    if record is None:
        return None
    steps = read_steps(run_dir / "config.yaml")
    try:
        return _format_progress(record, steps)
    except (KeyError, TypeError, ValueError, OverflowError):
        return "the last record of metrics.jsonl is not that of a step"


def _format_progress(record: dict[str, Any], steps: int | None) -> str:
    text = f"step {record['step']:d}" + (f" of {steps} ({record['step'] / steps:.0%})" if steps else "")
    if record.get("loss") is not None:
        text += f", loss {record['loss']:.4f}"
    text += f", {record['tokens_per_second']:,.0f} tokens/s"
    if steps and steps > record["step"]:
        left = timedelta(seconds=round((steps - record["step"]) * record["step_seconds"]))
        text += f", {left} of training left"
    return text


def _last_record(path: Path) -> dict[str, Any] | None:
    """Return the last complete record of the metrics file. Read only its last TAIL_BYTES bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None
