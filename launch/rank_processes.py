"""Start, watch and stop the ranks of one host, and return the exit code of the rank that failed first."""

from __future__ import annotations

import difflib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from infini_train.cli.command_list import COMMANDS
from launch.stop_signals import STOP_SIGNALS, StopSignals, print_stopped, print_stopping, stopped_exit_code

POLL_SECONDS = 0.05
GRACE_SECONDS = 60.0
"""Grace period of the other ranks after one failed, in seconds."""
AGREED_EXIT_CODES = (2, 85, 87)
"""Exit codes that all ranks reach together, without a signal: wrong input, stopped and resumable, unhealthy."""
MULTI_PROCESS_COMMANDS = ("pretrain", "evaluate", "generate", "preflight")
"""Commands whose processes share the work. With any other command, each process would do all of the work."""
HANG_EXIT_CODE = 86
"""Exit code of the watchdog when the job hangs. All ranks that still respond write their stack traces and end."""
HANG_GRACE_SECONDS = 2.0
"""Grace period after a hang, in seconds. A stopped rank (SIGSTOP) never ends by itself."""
STOPPED_EXIT_CODES = tuple(stopped_exit_code(number) for number in STOP_SIGNALS)
"""Exit codes of ranks killed by a stop signal. Such a rank was killed before its first step and leaves its peers waiting, so
the short grace period applies."""


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rank_environments(
    host: int, hosts: int, processes: int, master_addr: str, master_port: int, base: dict[str, str]
) -> list[dict[str, str]]:
    """Return torch.distributed's environment variables for each process of a host.

    Args:
        host: index of this host.
        hosts: number of hosts.
        processes: number of processes on each host.
        base: environment to extend. OMP_NUM_THREADS is set to an equal share of the cores unless `base` sets it.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    return [
        {
            "OMP_NUM_THREADS": str(threads),
            **base,
            "RANK": str(host * processes + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(hosts * processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
        }
        for local_rank in range(processes)
    ]


class OtherHosts(Protocol):
    """Interface to the launchers of other hosts; implemented in `host_link`."""

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        """Send the state of this host, and return the state of the whole job.

        Args:
            code: exit code of this host's failure, 0 without one.
            what: description of the failure.
            ended: whether all processes of this host have ended.

        Returns:
            Exit code and description of the job's first failure, and whether all hosts have ended.
        """


class NoOtherHosts:
    """The state of a job on a single host."""

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        return code, what, ended


class RankProcesses:
    """The rank processes of a run on this host."""

    def __init__(
        self,
        program: list[str],
        environments: list[dict[str, str]],
        stop: StopSignals,
        others: OtherHosts | None = None,
        command: str = "pretrain",
    ) -> None:
        """Start the processes.

        Args:
            environments: environment variables of each process.
            stop: signal handler, which forwards signals to the ranks from now on.
            others: launchers of other hosts. With None, failures are not printed, because the rank itself has printed them.
            command: name of the command, for messages.
        """
        self.stopped_by = 0
        self.command = command
        self.others = others
        self.numbers = [environment["RANK"] for environment in environments]
        self.ranks: list[subprocess.Popen[bytes]] = []
        print(f"launch: starting {describe_ranks(self.numbers, environments[0]['WORLD_SIZE'])}", file=sys.stderr, flush=True)
        stop.forward = self._stop
        for environment in environments:
            # Use a new session, so that Ctrl-C in the terminal reaches the ranks only once, through this process.
            self.ranks.append(subprocess.Popen(program, env=environment, start_new_session=True))
        if self.stopped_by:
            # The signal arrived while the ranks were being started, so the later ones have not received it.
            self._send(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for all ranks. Return 0 if every rank ended with 0, else the exit code of the first failure."""
        others = self.others or NoOtherHosts()
        own_code, own_words, failed_at, told = 0, "", 0.0, ""
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if not failed_at or HANG_EXIT_CODE in codes:
                # Later failures are consequences of the first, or of signals from this launcher.
                own_code, own_words = self._failure(codes, own_code, own_words)
            ended = None not in codes
            code, words, all_ended = others.exchange(own_code, own_words, ended)
            if code and not failed_at:
                failed_at = time.monotonic()
                if code not in AGREED_EXIT_CODES:
                    # Otherwise the other ranks would wait for the lost rank until a time-out.
                    self._send(signal.SIGTERM)
            if self.others is not None and words != told:
                print(f"launch: {words}", file=sys.stderr)
                told = words
            if ended and all_ended:
                if self.stopped_by and code in STOPPED_EXIT_CODES:
                    print_stopped(self.command)
                return code
            if code and time.monotonic() - failed_at > grace_seconds(code):
                self._send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _failure(self, codes: list[int | None], code: int, words: str) -> tuple[int, str]:
        """Return the first failure of a rank. A hang, which watchdogs establish together, replaces any other failure."""
        failed = [(value, number) for value, number in zip(codes, self.numbers, strict=True) if value]
        if not failed:
            return code, words
        # Several ranks may fail between two polls.
        value, number = max(failed, key=lambda each: failure_priority(shell_code(each[0])))
        if code and (value != HANG_EXIT_CODE or code == HANG_EXIT_CODE):
            return code, words
        if value == -signal.SIGTERM and self.stopped_by:
            return stopped_exit_code(self.stopped_by), f"rank {number} was asked to stop before a step was done"
        how = f"was killed by signal {-value}" if value < 0 else f"ended with exit code {value}"
        return shell_code(value), f"rank {number} {how}"

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _stop(self, number: int) -> None:
        if self.stopped_by:
            self._send(signal.SIGKILL)
            return
        self.stopped_by = number
        print_stopping(self.command)
        # Send SIGTERM for every stop signal: SIGINT would print a traceback for each rank that is still importing.
        self._send(signal.SIGTERM)


def shell_code(value: int) -> int:
    """Convert an exit code of `Popen`, which is negative for signals, to that of a shell, which is 128 plus the signal."""
    return value if value >= 0 else 128 - value


def failure_priority(code: int) -> int:
    """Return the priority of a failure among several: 3 hang, 2 killed by a signal, 1 other failure, 0 none.

    A rank that was killed makes its peers crash, and the launcher may see their exit codes first. SIGABRT does not count as
    killed, because a rank may abort when its communication breaks. Ranks killed by the launchers are not reported.
    """
    if code == HANG_EXIT_CODE:
        return 3
    return 2 if code > 128 and code != 128 + signal.SIGABRT else 1 if code else 0


def grace_seconds(code: int) -> float:
    """Return the seconds that ranks have to end after the first failure."""
    return HANG_GRACE_SECONDS if code in (HANG_EXIT_CODE, *STOPPED_EXIT_CODES) else GRACE_SECONDS


def describe_ranks(numbers: list[str], world_size: str) -> str:
    """Describe the ranks of this host for the start message."""
    if len(numbers) < int(world_size):
        return f"ranks {numbers[0]} to {numbers[-1]} of {world_size}"
    return f"{world_size} processes" if len(numbers) > 1 else "1 process"


def rank_program(command: list[str]) -> list[str]:
    """Return the command line of a rank for a launcher's command."""
    if command[0] == "preflight":
        return [sys.executable, str(Path(__file__).with_name("preflight.py")), *command[1:]]
    return [sys.executable, "-m", "infini_train", *command]


def check_configuration(command: list[str], world_size: int) -> int | None:
    """Check the configuration in one process, so that an error is printed once, before any rank is started.

    Returns:
        The exit code with which the launcher must end; None to continue.
    """
    if command[0] not in MULTI_PROCESS_COMMANDS:
        print(f"launch: error: {_launch_error(command[0])}", file=sys.stderr)
        return 2
    only_prints = not {"--print_config", "--help", "-h"}.isdisjoint(command)
    if command[0] != "pretrain" and not only_prints:
        return None
    checked = subprocess.run(
        [*rank_program(command), *(["--check_only"] if command[0] == "pretrain" else [])],
        env={**os.environ, "WORLD_SIZE": str(world_size)},
        check=False,
        # Use a new session, as for the ranks, so that only this process answers Ctrl-C in the terminal.
        start_new_session=True,
    )
    return checked.returncode if checked.returncode or only_prints else None


def _launch_error(command: str) -> str:
    if command in COMMANDS:
        return f"{command} is for one process: call infini-train {command} without a launcher"
    close = difflib.get_close_matches(command, [*MULTI_PROCESS_COMMANDS, *COMMANDS], n=1)
    return f"{command} is not a command; " + (f"did you mean {close[0]}?" if close else "`infini-train --help` lists them")
