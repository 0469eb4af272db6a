"""Files that `submit` and the job script write to a run directory.

    RUN/job.sh                  the job script
    RUN/logs/                   output of the jobs
    RUN/job/config.yaml         the configuration as submitted
    RUN/job/git.json git.diff   the state of the project's git repository
    RUN/job/submission.json     the job's id
    RUN/job/history             one line for each start, requeue and end
    RUN/job/failures            one line for each failure: the newest checkpoint at that time
    RUN/job/excluded            nodes that failed a preflight
    RUN/job/finished            present once the run has finished
    RUN/job/cancelled           present once the run is cancelled; prevents a requeue

An array has job.sh, logs/ and job/submission.json in its own folder. The other files are in task_0/, task_1/ and so on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from infini_train.runtime.errors import UserError


@dataclass(frozen=True)
class Submission:
    """A submitted job, as stored in submission.json."""

    job_id: str
    submitted: str
    """Local time of submission, as YYYY-MM-DD HH:MM:SS."""
    profile: str
    nodes: int
    processes: int
    tasks: int | None = None
    """Number of runs of an array; None for a single run."""


@dataclass(frozen=True)
class RunFiles:
    """Paths of the job files of one run or of an array."""

    run_dir: Path

    @property
    def script(self) -> Path:
        return self.run_dir / "job.sh"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def job(self) -> Path:
        return self.run_dir / "job"

    @property
    def config(self) -> Path:
        return self.job / "config.yaml"

    @property
    def cancelled(self) -> Path:
        return self.job / "cancelled"

    @property
    def finished(self) -> Path:
        return self.job / "finished"

    def task(self, number: int) -> RunFiles:
        """Return the files of one run of an array."""
        return RunFiles(self.run_dir / f"task_{number}")

    def prepare(self) -> None:
        """Create the folders, and delete files of an earlier job that would stop or restrict the next one."""
        self.job.mkdir(parents=True, exist_ok=True)
        for name in ("finished", "cancelled", "failures", "excluded", "bad_nodes"):
            (self.job / name).unlink(missing_ok=True)

    def history(self) -> list[str]:
        """Return the events of the run, one line each, oldest first."""
        try:
            return (self.job / "history").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def write_submission(self, submission: Submission) -> None:
        (self.job / "submission.json").write_text(json.dumps(asdict(submission), indent=1) + "\n", encoding="utf-8")

    def submission(self) -> Submission | None:
        """Return the newest job, or None if the run was never submitted.

        Raises:
            UserError: the file cannot be read or parsed.
        """
        path = self.job / "submission.json"
        try:
            found = Submission(**json.loads(path.read_text(encoding="utf-8")))
            if not isinstance(found.job_id, str) or not isinstance(found.tasks, int | None):
                raise TypeError("job_id is not text, or tasks is not a number")
            return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it, and look for the job with squeue") from error
