"""Start and stop daemons, and find the processes of a virtual node by a mark in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tests.support.slurm.configuration import NODE_MARK

SLURM_DAEMONS = ("slurmd", "slurmstepd")


def start_daemon(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground, in its own session. The kernel kills it if this process dies first."""
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=log.parent,
            start_new_session=True,
        )


def stop_daemon(daemon: subprocess.Popen[bytes], timeout_seconds: float = 5.0) -> None:
    if daemon.poll() is None:
        daemon.terminate()
        try:
            daemon.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            daemon.kill()
    daemon.wait()


def until(condition: Callable[[], bool], timeout_seconds: float, what: Callable[[], str]) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: the condition is still false at the time limit; the message has `what()`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what()}")
        time.sleep(0.1)


def read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError:  # the process has ended, or belongs to another user
        return ""


def process_table() -> Iterator[tuple[int, int, str]]:
    """Yield the id, the parent's id and the program name of every process that is not a zombie."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := read(f"/proc/{entry}/stat")):
            program = stat[stat.index("(") + 1 : stat.rindex(")")]
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            if state not in "ZX":
                yield int(entry), int(parent), program


def node_processes(mark: str) -> dict[int, str]:
    """Return id and program of each process with the mark "FOLDER/NODE" in its environment, and of its descendants."""
    table = list(process_table())
    entry = f"{NODE_MARK}={mark}"
    found = {pid: program for pid, _, program in table if entry in read(f"/proc/{pid}/environ").split("\0")}
    while more := {pid: program for pid, parent, program in table if parent in found and pid not in found}:
        found.update(more)
    return found


def job_processes(mark: str) -> list[int]:
    """Return the ids of a node's processes, except SLURM's daemons."""
    return [pid for pid, program in node_processes(mark).items() if program not in SLURM_DAEMONS]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
