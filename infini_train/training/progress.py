"""Progress display on the terminal: loss, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_SECONDS = 10.0
"""Time between lines where the output is no terminal."""


class TrainingProgress:
    """A live progress bar on a terminal; in a log file, a line every ten seconds. Prints only if `enabled`."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self.console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step = first_step
        self._started = time.monotonic()
        self._last_line = 0.0

    def __enter__(self) -> TrainingProgress:
        if self.enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=self.total_steps, completed=self._first_step, facts="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show a step's metrics."""
        if not self.enabled:
            return
        facts = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_SECONDS or step == self.total_steps:
            self._last_line = now
            left = (now - self._started) / max(1, step - self._first_step) * (self.total_steps - step)
            self.say(f"step {step}/{self.total_steps}  {facts}  {left / 60:.1f} min left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)
