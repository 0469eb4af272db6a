"""The signals that ask to stop ask for a checkpoint and a clean exit at the end of the step."""

from __future__ import annotations

import signal
from typing import Any

from infini_train.stop_signals import catch_stop_signals

RESUMABLE_EXIT_CODE = 85
"""Exit code of a run that stopped early, saved, and goes on when it is started again."""


class StopRequest:
    """Set by a signal on this process; the loop shares it with all processes once a step."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = catch_stop_signals(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int) -> None:
        self.signal_number = number
