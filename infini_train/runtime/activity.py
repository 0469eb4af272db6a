"""Record of the operation in progress, so that the watchdog can report where a rank is stuck."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """The operation in progress. The training thread writes it and other threads read it, so each update is one assignment."""

    def __init__(self, operation: str) -> None:
        self.limit = "first_step"
        """Name of the time limit that applies: first_step, step or save (see HealthConfig). `set_limit` changes it."""
        self.on_limit: Callable[[], None] = lambda: None
        """Called immediately on each change of the limit, even if the operation is very short."""
        self.step = 0
        """Number of the step in progress, from 1; 0 before the first."""
        self._now = (operation, False, time.monotonic())

    def begin(self, operation: str, *, waits: bool = False) -> None:
        """Record the start of an operation.

        Args:
            operation: name of the operation, for reports.
            waits: the operation only waits for other processes.
        """
        self._now = (operation, waits, time.monotonic())

    def set_limit(self, limit: str) -> None:
        """Change the time limit that applies."""
        if limit != self.limit:
            self.limit = limit
            self.on_limit()

    @contextmanager
    def during(self, operation: str, limit: str) -> Iterator[None]:
        """Record an operation that has its own time limit, and restore the previous limit afterwards."""
        before = self.limit
        self.begin(operation)
        self.set_limit(limit)
        try:
            yield
        finally:
            self.begin(f"work after the {operation}")
            self.set_limit(before)

    def now(self) -> tuple[str, bool, float]:
        """Return the operation, whether it only waits for other processes, and its duration so far in seconds."""
        operation, waits, since = self._now
        return operation, waits, time.monotonic() - since
