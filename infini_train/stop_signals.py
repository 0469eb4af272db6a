"""The signals that ask a process to stop, and what becomes of its words once its terminal is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, what schedulers send, and the end of a terminal or of an ssh connection."""


def catch_stop_signals(handle: Callable[[int], None]) -> dict[int, Any]:
    """Call `handle` with the number of each that comes; under nohup none comes from the terminal's end.

    Returns:
        What signals were handled by before, for `signal.signal`.
    """
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def receive(number: int, _: FrameType | None) -> None:
        _leave_lost(terminals)
        handle(number)

    caught = [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in caught}


def _leave_lost(terminals: list[int]) -> None:
    """Let streams of a terminal that is gone end nowhere: a line written to it would raise, before a checkpoint is saved."""
    for stream in terminals:
        if not os.isatty(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
