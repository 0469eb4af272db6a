"""The rank processes of one host: started, watched, stopped together, with the exit code of the one that failed first."""

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
from launch.stop_signals import STOP_SIGNALS, StopSignals, say_stopped, say_stopping, stopped_exit_code

POLL_SECONDS = 0.05
GRACE_SECONDS = 60.0
"""How long the others may take to end after one process failed."""
AGREED_EXIT_CODES = (2, 85, 87)
"""All ranks find the same and end by themselves: wrong input, stopped and resumable, unhealthy."""
ON_SEVERAL_PROCESSES = ("pretrain", "evaluate", "generate", "preflight")
"""Commands whose processes work together; those of another would each do all of its work."""
HANG_EXIT_CODE = 86
"""The watchdog of a rank found that the job hangs; all ranks that can still run have written their stacks and end."""
HANG_GRACE_SECONDS = 2.0
"""How long the others may take to end then; a stopped rank never does."""
STOPPED_EXIT_CODES = tuple(stopped_exit_code(number) for number in STOP_SIGNALS)
"""A rank that such a signal ended had not begun to train, and others that wait for it to come cannot know: short grace."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rank_environments(
    host: int, hosts: int, processes: int, master_addr: str, master_port: int, base: dict[str, str]
) -> list[dict[str, str]]:
    """torch.distributed's variables for each process of a host; a thread count in `base` is kept.

    Args:
        host: index of this host.
        processes: on each host.
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
    """What the launchers of other hosts know, see `host_link`."""

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        """Tell the state of this host, learn that of all.

        Args:
            code: exit code of this host's failure, 0 without one.
            what: the failure in words.
            ended: all processes of this host have ended.

        Returns:
            The same for the whole job: its first failure, and whether all hosts have ended.
        """


class NoOtherHosts:
    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        return code, what, ended


class RankProcesses:
    """The ranks of a run on this host."""

    def __init__(
        self,
        program: list[str],
        environments: list[dict[str, str]],
        stop: StopSignals,
        others: OtherHosts | None = None,
        command: str = "pretrain",
    ) -> None:
        """Start them.

        Args:
            environments: one for each process.
            stop: what it catches is passed on from here on.
            others: None if there are no other hosts; nothing is then said of a failure, which the rank itself has told.
            command: what the program does, for words.
        """
        self.stopped_by = 0
        self.command = command
        self.others = others
        self.numbers = [environment["RANK"] for environment in environments]
        self.ranks: list[subprocess.Popen[bytes]] = []
        print(f"launch: starting {in_words(self.numbers, environments[0]['WORLD_SIZE'])}", file=sys.stderr, flush=True)
        stop.pass_on = self._stop
        for environment in environments:
            # A session of their own: a terminal's Ctrl-C reaches the ranks through this process, once, not twice.
            self.ranks.append(subprocess.Popen(program, env=environment, start_new_session=True))
        if self.stopped_by:
            # Between two of them, so that the later ones have not been told.
            self._send(signal.SIGTERM)

    def wait(self) -> int:
        """Exit code of the run: 0 if every rank ended with 0, else the first code that was not."""
        others = self.others or NoOtherHosts()
        own_code, own_words, failed_at, told = 0, "", 0.0, ""
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if not failed_at or HANG_EXIT_CODE in codes:
                # What comes later is the consequence, of signals from here too.
                own_code, own_words = self._failure(codes, own_code, own_words)
            ended = None not in codes
            code, words, all_ended = others.exchange(own_code, own_words, ended)
            if code and not failed_at:
                failed_at = time.monotonic()
                if code not in AGREED_EXIT_CODES:
                    # The others would wait for the lost rank until a time-out.
                    self._send(signal.SIGTERM)
            if self.others is not None and words != told:
                print(f"launch: {words}", file=sys.stderr)
                told = words
            if ended and all_ended:
                if self.stopped_by and code in STOPPED_EXIT_CODES:
                    say_stopped(self.command)
                return code
            if code and time.monotonic() - failed_at > grace_seconds(code):
                self._send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _failure(self, codes: list[int | None], code: int, words: str) -> tuple[int, str]:
        """The first failure of a rank; a hang, which the watchdog finds with others' help, outweighs the rest."""
        failed = [(value, number) for value, number in zip(codes, self.numbers, strict=True) if value]
        if not failed:
            return code, words
        # Between two looks several may fail.
        value, number = max(failed, key=lambda each: weight(shell_code(each[0])))
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
        say_stopping(self.command)
        # Whichever signal came: Ctrl-C would show a traceback of each rank that is still importing.
        self._send(signal.SIGTERM)


def shell_code(value: int) -> int:
    """The exit code of a process as a shell counts signals; of `Popen`, which has them negative."""
    return value if value >= 0 else 128 - value


def weight(code: int) -> int:
    """How far a failure explains others, which may be heard of first: ranks crash when they lose one that was killed.

    But abort() may be how a rank ends whose communication broke. Deaths by the launchers' own signals are not reported.
    """
    if code == HANG_EXIT_CODE:
        return 3
    return 2 if code > 128 and code != 128 + signal.SIGABRT else 1 if code else 0


def grace_seconds(code: int) -> float:
    """How long ranks may take to end after the first failure."""
    return HANG_GRACE_SECONDS if code in (HANG_EXIT_CODE, *STOPPED_EXIT_CODES) else GRACE_SECONDS


def in_words(numbers: list[str], world_size: str) -> str:
    """The ranks of this host, for the line at the start."""
    if len(numbers) < int(world_size):
        return f"ranks {numbers[0]} to {numbers[-1]} of {world_size}"
    return f"{world_size} processes" if len(numbers) > 1 else "1 process"


def rank_program(command: list[str]) -> list[str]:
    """What a rank executes for a launcher's command."""
    if command[0] == "preflight":
        return [sys.executable, str(Path(__file__).with_name("preflight.py")), *command[1:]]
    return [sys.executable, "-m", "infini_train", *command]


def check_configuration(command: list[str], world_size: int) -> int | None:
    """Let one process say what is wrong with a configuration before any other is started.

    Returns:
        The exit code to leave with; None to go on.
    """
    if command[0] not in ON_SEVERAL_PROCESSES:
        print(f"launch: error: {_not_to_launch(command[0])}", file=sys.stderr)
        return 2
    only_prints = not {"--print_config", "--help", "-h"}.isdisjoint(command)
    if command[0] != "pretrain" and not only_prints:
        return None
    checked = subprocess.run(
        [*rank_program(command), *(["--check_only"] if command[0] == "pretrain" else [])],
        env={**os.environ, "WORLD_SIZE": str(world_size)},
        check=False,
        # As the ranks: a terminal's Ctrl-C is answered once, by this process.
        start_new_session=True,
    )
    return checked.returncode if checked.returncode or only_prints else None


def _not_to_launch(command: str) -> str:
    if command in COMMANDS:
        return f"{command} is for one process: call infini-train {command} without a launcher"
    close = difflib.get_close_matches(command, [*ON_SEVERAL_PROCESSES, *COMMANDS], n=1)
    return f"{command} is no command; " + (f"did you mean {close[0]}?" if close else "`infini-train --help` lists them")
