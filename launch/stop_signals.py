"""What Ctrl-C and its kin do to a launcher: before there are ranks they end it, after that it passes them on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from infini_train.runtime.signals import STOP_SIGNALS, catch_stop_signals


class Stopped(Exception):
    """A signal came before a rank was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = stopped_exit_code(number)


class StopSignals:
    """Catches the signals from its construction on.

    Attributes:
        pass_on: gets the signal's number; while it is None, `Stopped` is raised wherever the launcher is.
    """

    def __init__(self) -> None:
        self.pass_on: Callable[[int], None] | None = None
        catch_stop_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.pass_on is not None:
            self.pass_on(number)
            return
        # Who presses twice must not interrupt the line that answers the first.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)


def stopped_exit_code(number: int) -> int:
    """As a shell counts a process that this signal killed."""
    return 128 + number


def say_stopping(command: str) -> None:
    """Answer a signal while there are ranks. They may still be starting, which the launcher does not see."""
    # The terminal shows ^C at the beginning of the line.
    if command == "pretrain":
        when = "after the step, with a checkpoint, or at once if the processes are still starting"
        print(f"\nstopping {when}; once more to stop at once", file=sys.stderr)
    else:
        print("\nstopping; once more to stop at once", file=sys.stderr)


def say_stopped(command: str) -> None:
    """What came of a run whose ranks did not get to save."""
    if command == "pretrain":
        what = "stopped before a step was done; nothing new was saved"
    else:
        what = f"stopped before {command} was done"
    print(f"launch: {what}: start the same command again", file=sys.stderr)
