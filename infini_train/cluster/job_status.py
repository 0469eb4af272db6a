"""What `infini-train status` says: the job, the run's progress, and what happened."""

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
TAIL_BYTES = 65536


def status_lines(run_dir: Path) -> list[str]:
    """Everything worth knowing of a run, or of every run of an array.

    Raises:
        UserError: the folder is no run directory, or SLURM cannot be asked.
    """
    files = RunFiles(run_dir)
    submission = files.submission()
    if submission is not None and submission.tasks is not None:
        lines = [f"array       {submission.job_id}, {submission.tasks} runs, submitted {submission.submitted}"]
        for number in range(submission.tasks):
            task = files.task(number)
            lines.append(f"task_{number:<6} {_job(task.submission())}; {_progress(task.run_dir) or 'no step yet'}")
        return lines
    progress = _progress(run_dir)
    if submission is None and progress is None:
        raise UserError(f"{run_dir} holds no run: neither job/submission.json nor metrics.jsonl; name a run_dir")
    lines = [f"run         {run_dir}", f"job         {_job(submission)}", f"progress    {progress or 'no step yet'}"]
    if checkpoints := list_checkpoints(run_dir):
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(checkpoints[-1].stat().st_mtime))
        lines.append(f"checkpoint  {checkpoints[-1].name}, {written}")
    if (excluded := files.job / "excluded").is_file():
        lines.append(f"left out    {', '.join(sorted(set(excluded.read_text(encoding='utf-8', errors='replace').split())))}")
    if (log := newest_log(run_dir)) is not None:
        lines.append(f"log         {log}")
    return lines + [f"            {event}" for event in files.history()[-EVENTS:]]


def _job(submission: Submission | None) -> str:
    if submission is None:
        return "none: not started by `infini-train submit`"
    head = f"{submission.job_id}"
    if not slurm.available():
        return f"{head}, submitted {submission.submitted} (SLURM's commands are not on this machine)"
    state = slurm.job_state(submission.job_id)
    if state is None:
        return f"{head}, submitted {submission.submitted}, ended (SLURM remembers no more)"
    fields = state.fields
    parts = [f"{head} {state.state}"]
    if state.pending and fields.get("Reason", "None") != "None":
        parts.append(f"reason {fields['Reason']}")
    if fields.get("NodeList", "(null)") != "(null)":
        parts.append(f"on {fields['NodeList']}")
    if state.running:
        parts.append(f"{fields.get('RunTime')} of {fields.get('TimeLimit')}")
    if int(fields.get("Restarts", "0")):
        parts.append(f"requeued {fields['Restarts']} times")
    if not state.active and "ExitCode" in fields:
        parts.append(f"exit code {fields['ExitCode'].partition(':')[0]}")
    return ", ".join(parts)


def _progress(run_dir: Path) -> str | None:
    record = _last_record(run_dir / "metrics.jsonl")
    if record is None:
        return None
    steps = read_steps(run_dir / "config.yaml")
    try:
        return _in_words(record, steps)
    except (KeyError, TypeError, ValueError, OverflowError):
        return "metrics.jsonl ends in a record that is none of a step"


def _in_words(record: dict[str, Any], steps: int | None) -> str:
    text = f"step {record['step']:d}" + (f" of {steps} ({record['step'] / steps:.0%})" if steps else "")
    if record.get("loss") is not None:
        text += f", loss {record['loss']:.4f}"
    text += f", {record['tokens_per_second']:,.0f} tokens/s"
    if steps and steps > record["step"]:
        left = timedelta(seconds=round((steps - record["step"]) * record["step_seconds"]))
        text += f", {left} of training left"
    return text


def _last_record(path: Path) -> dict[str, Any] | None:
    """The last whole line of the metrics, without reading all of them."""
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
