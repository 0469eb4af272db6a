"""Signals that ask a process to stop, and the redirection of its output when its terminal is closed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, the signals of schedulers, and the end of a terminal or of an ssh connection."""


def catch_stop_signals(handle: Callable[[int], None]) -> dict[int, Any]:
    """Call `handle` with the number of each stop signal. Keep SIGHUP ignored if it is ignored already, as under nohup.

    Returns:
        The previous handler of each caught signal, by number, to restore with `signal.signal`.
    """
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def receive(number: int, _: FrameType | None) -> None:
        _redirect_closed_terminals(terminals)
        handle(number)

    caught = [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in caught}


def _redirect_closed_terminals(terminals: list[int]) -> None:
    """Redirect streams of a closed terminal to /dev/null: writing to one raises, and would end the run before it saves."""
    for stream in terminals:
        if not os.isatty(stream):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream)
            os.close(null)
