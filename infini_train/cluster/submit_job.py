"""`infini-train submit`: render a job script, write the job files to the run directory, and submit the job."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from infini_train.cluster import slurm
from infini_train.cluster.cluster_profile import ClusterProfile, load_profile
from infini_train.cluster.git_state import write_git_state
from infini_train.cluster.job_script import PROJECT, Job, job_name, render_job
from infini_train.cluster.secrets import refuse_secrets
from infini_train.cluster.submission import RunFiles, Submission
from infini_train.cluster.sweep import sweep_runs
from infini_train.config import RunConfig, dump_config
from infini_train.config.validation import validate
from infini_train.planning.layout_plan import PLANNED_ATTENTION, plan
from infini_train.planning.plan_text import headline
from infini_train.planning.refusal import refuse_too_large
from infini_train.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """The options of `submit` that do not belong to the run configuration."""

    profile: str
    nodes: int
    time_limit: str | None = None
    name: str | None = None
    sweeps: Sequence[str] = ()
    max_parallel: int = 0
    exclude: str | None = None


@dataclass(frozen=True)
class PreparedJob:
    """A validated job with its rendered script, ready to submit."""

    job: Job
    script: str
    runs: list[RunConfig]
    profile: ClusterProfile
    expected: str | None = None
    """One-line result of `infini-train plan` for the first run; None if the profile does not name its GPU."""

    @property
    def processes(self) -> int:
        return self.job.nodes * self.profile.processes


def prepare_job(run: RunConfig, options: SubmitOptions) -> PreparedJob:
    """Validate the job without calling SLURM, and render its script. Write nothing.

    Raises:
        UserError: the run, the profile or an option is invalid.
    """
    profile = load_profile(options.profile)
    # The job starts in another folder, so make the path absolute.
    run = replace(run, run_dir=str(_expand_home(run.run_dir).absolute()))
    runs = sweep_runs(run, list(options.sweeps)) if options.sweeps else [run]
    run_dir = Path(run.run_dir)
    job = Job(
        run_dir=run_dir,
        name=options.name if options.name is not None else job_name(run_dir),
        nodes=options.nodes,
        time_limit=options.time_limit or profile.time_limit,
        submit_dir=Path.cwd(),
        python=profile.python or sys.executable,
        tasks=len(runs) if options.sweeps else None,
        max_parallel=options.max_parallel,
        exclude=options.exclude,
    )
    script = render_job(job, profile)
    try:
        script.encode()
    except UnicodeEncodeError as error:
        at = script.rfind("\n", 0, error.start) + 1
        line = ascii(script[at : script.find("\n", at)])
        raise UserError(
            f"the job script would contain the line {line}, which is not text in UTF-8; rename the file or folder in it"
        ) from error
    processes = job.nodes * profile.processes
    for each in runs:
        validate(each, processes)
    expected = _plan_headline(runs, processes, profile) if profile.gpu is not None else None
    refuse_secrets("the job's script", script)
    for each in runs:
        refuse_secrets("the configuration", dump_config(each))
    return PreparedJob(job, script, runs, profile, expected)


def _expand_home(run_dir: str) -> Path:
    try:
        return Path(run_dir).expanduser()
    except RuntimeError as error:
        raise UserError(f"run_dir is {run_dir}, but there is no such home folder; give an absolute path") from error


def _plan_headline(runs: list[RunConfig], processes: int, profile: ClusterProfile) -> str:
    """Plan all runs, and return the plan of the first one in one line.

    Raises:
        UserError: a run does not fit in the memory of the profile's GPUs.
    """
    assert profile.gpu is not None
    if runs[0].model.attention not in PLANNED_ATTENTION:
        return f"not planned: the planner does not support model.attention {runs[0].model.attention}"
    plans = [plan(each, processes, profile.gpu, gpus_per_node=profile.processes) for each in runs]
    for each in plans:
        try:
            refuse_too_large(each)
        except UserError as error:
            raise UserError(f"{error} (--gpus is --nodes × {profile.processes})") from error
    return headline(plans[0])


def submit(prepared: PreparedJob, profile_name: str) -> Submission:
    """Write the job files to the run directory and submit the job.

    Raises:
        UserError: the run has an active job, the folder cannot be written, or SLURM refuses the job.
    """
    job = prepared.job
    files = RunFiles(job.run_dir)
    tasks = [files] if job.tasks is None else [files.task(number) for number in range(job.tasks)]
    _refuse_second_job([files, *tasks])
    try:
        for task, run in zip(tasks, prepared.runs, strict=True):
            task.prepare()
            task.config.write_text(dump_config(run), encoding="utf-8")
            write_git_state(PROJECT, task.job)
        files.job.mkdir(exist_ok=True)
        # Without the log folder, SLURM would end the job without an error message.
        files.logs.mkdir(exist_ok=True)
        files.script.write_text(prepared.script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"run_dir {job.run_dir} cannot be written: {error.strerror or error}") from error
    job_id = slurm.submit_script(files.script)
    submission = Submission(
        job_id, time.strftime("%Y-%m-%d %H:%M:%S"), profile_name, job.nodes, prepared.processes, tasks=job.tasks
    )
    try:
        files.write_submission(submission)
        if job.tasks is not None:
            for number, task in enumerate(tasks):
                task.write_submission(replace(submission, job_id=f"{job_id}_{number}", tasks=None))
    except OSError as error:
        raise UserError(
            f"job {job_id} is submitted, but run_dir {job.run_dir} cannot be written ({error.strerror or error}), so `status`, "
            f"`logs` and `cancel` cannot find it; `scancel {job_id}` ends it"
        ) from error
    return submission


def _refuse_second_job(runs: list[RunFiles]) -> None:
    for files in runs:
        submission = files.submission()
        state = slurm.job_state(submission.job_id) if submission is not None else None
        if state is not None and state.active:
            raise UserError(
                f"run_dir {files.run_dir} has job {state.job_id}, which is {state.state}; "
                f"`infini-train cancel {quote(str(files.run_dir))}` ends it, or give this run another run_dir"
            )
