"""Ctrl-C, SIGTERM and SIGUSR1 ask for a checkpoint and a clean exit at the end of the step."""

from __future__ import annotations

import signal
from types import FrameType

RESUMABLE_EXIT_CODE = 85
"""Exit code of a run that stopped early, saved, and goes on when it is started again."""


class StopRequest:
    """Set by a signal on this process; the loop shares it with all processes once a step."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
