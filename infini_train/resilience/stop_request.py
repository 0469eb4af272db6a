"""Stop requests by signal: the run finishes its step, saves a checkpoint and exits cleanly."""

from __future__ import annotations

import signal
from typing import Any

from infini_train.runtime.signals import catch_stop_signals

RESUMABLE_EXIT_CODE = 85
"""Exit code of a run that was stopped early and saved a checkpoint; it resumes when started again."""


class StopRequest:
    """Records a stop signal to this process. The training step shares it with all ranks."""

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
