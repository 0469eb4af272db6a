"""A real SLURM cluster of several nodes on one machine, private to the tests.

Each node is a slurmd with its own name and port. The nodes share the network, the disks and the cgroups. Each node has its own
temporary folder, and its processes are identified by a mark in their environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tests.support.slurm.configuration import NODE_MARK, write_configuration
from tests.support.slurm.processes import job_processes, node_processes, send, start_daemon, stop_daemon, until
from tests.support.slurm.records import ENDED, parse_records
from tests.support.slurm.requirement import SEARCH_PATH

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "srun", "scancel", "sinfo", "setpriv")
START_SECONDS = 30.0

Job = dict[str, str]


class SlurmCluster:
    """A cluster of the nodes n1, n2 and so on, with the partitions `low` (preemptable, the default) and `high`.

    `folder` is a private folder with all files, deleted by `close`.

    Raises:
        AssertionError: a daemon does not start; the message has the daemons' logs.
    """

    def __init__(self, nodes: int = 3) -> None:
        self.nodes = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        # MUNGE requires that all users can reach its socket.
        self.folder.chmod(0o711)
        self._configuration = write_configuration(self.folder, self.nodes)
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self._servers: list[subprocess.Popen[bytes]] = []
        try:
            self._start_munged()
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self._start_slurmd(node)
            until(self._all_idle, START_SECONDS, lambda: f"all nodes idle\n{self._logs()}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Commands and their output.

    def environment(self) -> dict[str, str]:
        """Return this process's environment with this cluster's SLURM settings instead of any other's."""
        other = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_", NODE_MARK)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
        return {**kept, "SLURM_CONF": str(self._configuration.slurm_conf), "PATH": SEARCH_PATH}

    def run(self, *command: str, timeout_seconds: float = 120.0) -> str:
        """Run a command in the cluster's folder `work`, and return its standard output.

        Raises:
            AssertionError: the command fails; the message has all output.
        """
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self.folder / "work",
            timeout=timeout_seconds,
            check=False,
        )
        if result.returncode:
            raise AssertionError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def show(self, *what: str) -> list[Job]:
        """Return the records of `scontrol show`. Retry if a busy slurmctld hangs up, which ends scontrol by SIGPIPE."""
        tries_left = 3
        while True:
            tries_left -= 1
            try:
                return parse_records(self.run("scontrol", "--oneliner", "show", *what))
            except AssertionError as error:
                if not tries_left or f"exit code {-signal.SIGPIPE}" not in str(error):
                    raise
                time.sleep(1)

    def job(self, job_id: str) -> Job:
        """Return the record of a job or of an array's task ("12_0"), by scontrol's keys."""
        records = self.show("job", job_id)
        assert len(records) == 1, f"job {job_id} is an array of {len(records)} tasks; name one, as in {job_id}_0"
        return records[0]

    def jobs(self) -> list[Job]:
        return self.show("job")

    def node_states(self) -> dict[str, str]:
        """Return each node's state in scontrol's notation: "IDLE", "ALLOCATED", "DOWN+NOT_RESPONDING"."""
        records = self.show("node")
        return {record["NodeName"]: record["State"] for record in records}

    def wait(self, job_id: str, expected: str | tuple[str, ...] | Callable[[Job], bool], timeout_seconds: float = 60.0) -> Job:
        """Wait until the job has one of the expected states, or until a function of the job returns true. Return the job.

        Raises:
            AssertionError: the time limit has passed, or the job has ended in another state. The message has the job's record
                and the end of its log.
        """
        states = (expected,) if isinstance(expected, str) else expected
        deadline = time.monotonic() + timeout_seconds
        ended = 0.0
        while True:
            job = self.job(job_id)
            if states(job) if callable(states) else job["JobState"] in states:
                return job
            now = time.monotonic()
            ended = ended or now if job["JobState"] in ENDED else 0.0
            # A job that is being requeued briefly shows an ended state.
            if now > deadline or (not callable(states) and ended and now > ended + 5):
                wanted = "in the expected state" if callable(states) else " or ".join(states)
                raise AssertionError(f"job {job_id} is not {wanted} after {timeout_seconds:g} s\n{self._describe(job)}")
            time.sleep(0.2)

    # Nodes and their failures.

    def temporary_folder(self, node: str) -> Path:
        """Return the TMPDIR of a node's jobs. A test may damage it; `heal` repairs it."""
        return self._configuration.temporary_folder(node)

    def kill_node(self, node: str, processes_too: bool = True) -> None:
        """Lose a node without notice, so that SLURM detects the loss only by its timeout (about 25 s).

        With `processes_too`, kill everything on the node, as in a power failure. Without it, simulate a network failure: kill
        slurmd and stop SLURM's step daemons, so that they do not respond. The processes of jobs continue. `restart_node`
        restores the network.
        """
        slurmd = self._slurmds.pop(node)
        slurmd.kill()
        slurmd.wait()
        if processes_too:
            self._kill_processes(node)
        else:
            send(self._step_daemons(node), signal.SIGSTOP)

    def restart_node(self, node: str) -> None:
        """Restart a node's slurmd, and resume stopped step daemons."""
        if node in self._slurmds:
            stop_daemon(self._slurmds.pop(node))
        send(self._step_daemons(node), signal.SIGCONT)
        self._start_slurmd(node)

    def heal(self) -> None:
        """End all jobs, bring all nodes up and idle, and empty the temporary folders. SLURM keeps records of ended jobs."""
        for node in self.nodes:
            if node not in self._slurmds:
                self._kill_processes(node)
                self._start_slurmd(node)
        # A job may be requeued, by its script or by SLURM, while it is being cancelled.
        until(self._empty, START_SECONDS, lambda: f"all nodes idle and no job\n{self._logs()}")
        for node in self.nodes:
            folder = self.temporary_folder(node)
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink(missing_ok=True)
            folder.mkdir()

    def close(self) -> None:
        """End all processes of this cluster, and delete its folder."""
        for node in self.nodes:
            if node in self._slurmds:
                self.kill_node(node)
            self._kill_processes(node)
        for server in reversed(self._servers):
            stop_daemon(server)
        self._servers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_daemons(self) -> None:
        for daemon in (*self._servers, *self._slurmds.values()):
            assert daemon.poll() is None, f"{daemon.args} ended with {daemon.returncode}\n{self._logs()}"

    def _all_idle(self) -> bool:
        self._check_daemons()
        try:
            states = self.node_states()
        except AssertionError:  # slurmctld does not respond yet
            return False
        for node, state in states.items():
            if "DOWN" in state or "DRAIN" in state:
                # SLURM refuses this if the node has recovered by itself in the meantime.
                resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
                subprocess.run(resume, env=self.environment(), capture_output=True, check=False)
        return set(states) == set(self.nodes) and set(states.values()) == {"IDLE"}

    def _empty(self) -> bool:
        active = {job["JobId"] for job in self.jobs() if job["JobState"] not in ENDED}
        if active:
            subprocess.run(["scancel", *active], env=self.environment(), capture_output=True, check=False)
            # Do not wait for KillWait.
            for node in self.nodes:
                send(self._job_processes(node), signal.SIGKILL)
            return False
        return self._all_idle() and not any(self._job_processes(node) for node in self.nodes)

    def _start(self, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        environment = {**self.environment(), **variables}
        daemon = start_daemon(list(command), environment, self.folder / "start.log")
        if not variables:
            self._servers.append(daemon)
        return daemon

    def _start_munged(self) -> None:
        files = {"key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed", "log-file": "munge.log"}
        socket = self._configuration.munge_socket
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--num-threads=2", f"--socket={socket}", *options)

        def listens() -> bool:
            self._check_daemons()
            return socket.is_socket()

        until(listens, START_SECONDS, lambda: f"munged listens\n{self._logs()}")

    def _start_slurmd(self, node: str) -> None:
        self._slurmds[node] = self._start("slurmd", "-D", "-N", node, **{NODE_MARK: self._mark(node)})

    def _mark(self, node: str) -> str:
        return str(self.folder / node)

    def _job_processes(self, node: str) -> list[int]:
        return job_processes(self._mark(node))

    def _step_daemons(self, node: str) -> list[int]:
        return [pid for pid, program in node_processes(self._mark(node)).items() if program == "slurmstepd"]

    def _kill_processes(self, node: str) -> None:
        """Kill all processes of a node, including those started in the meantime."""

        def gone() -> bool:
            left = node_processes(self._mark(node))
            send(left, signal.SIGKILL)
            return not left

        until(gone, 10.0, lambda: f"{node} without processes: {node_processes(self._mark(node))}")

    def _describe(self, job: Job) -> str:
        fields = "\n".join(f"  {key}={value}" for key, value in job.items())
        return f"{fields}\n{tail(Path(job.get('StdOut', '')), 40)}\n{tail(self.folder / 'slurmctld.log', 20)}"

    def _logs(self) -> str:
        return "\n".join(tail(path, 20) for path in sorted(self.folder.glob("*.log")))


def tail(path: Path, lines: int) -> str:
    """Return a heading and a file's last lines."""
    if not path.is_file():
        return f"--- {path} does not exist"
    with path.open(errors="replace") as file:
        return f"--- {path}\n{''.join(deque(file, lines))}"
