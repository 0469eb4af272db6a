"""Stop signals in a launcher: end the launcher before ranks are started, and forward to the ranks afterwards."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from infini_train.runtime.signals import STOP_SIGNALS, catch_stop_signals


class Stopped(Exception):
    """A stop signal arrived before a rank was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = stopped_exit_code(number)


class StopSignals:
    """Handler of the stop signals, installed at construction.

    Attributes:
        forward: function that is called with the signal number. While it is None, a signal raises `Stopped` in the main thread.
    """

    def __init__(self) -> None:
        self.forward: Callable[[int], None] | None = None
        catch_stop_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.forward is not None:
            self.forward(number)
            return
        # Ignore further signals, so that they do not interrupt the message that answers the first.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)


def stopped_exit_code(number: int) -> int:
    """Return the exit code that a shell reports for a process killed by this signal."""
    return 128 + number


def print_stopping(command: str) -> None:
    """Print that the ranks are stopping. The launcher cannot tell whether they are still starting."""
    # Start a new line, because the terminal has printed ^C.
    if command == "pretrain":
        when = "after the step, with a checkpoint, or at once if the processes are still starting"
        print(f"\nstopping {when}; signal again to stop at once", file=sys.stderr)
    else:
        print("\nstopping; signal again to stop at once", file=sys.stderr)


def print_stopped(command: str) -> None:
    """Print that a run was stopped before its ranks could save."""
    if command == "pretrain":
        what = "stopped before a step was done; nothing new was saved"
    else:
        what = f"stopped before {command} was done"
    print(f"launch: {what}: start the same command again", file=sys.stderr)
