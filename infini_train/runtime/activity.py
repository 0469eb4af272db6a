"""Record the operation in progress, so that the watchdog can report where a rank is stuck."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """The operation in progress. The training thread writes it by one assignment; other threads read it."""

    def __init__(self, operation: str) -> None:
        self.limit = "first_step"
        """Time limit in force: first_step, step or save (see HealthConfig). Changed by `set_limit`."""
        self.on_limit: Callable[[], None] = lambda: None
        """Called at once when the limit changes, even if the operation is short."""
        self.step = 0
        """Number of the step in progress, from 1; 0 before the first."""
        self._now = (operation, False, time.monotonic())

    def begin(self, operation: str, *, waits: bool = False) -> None:
        """Record the operation that begins now.

        Args:
            waits: whether the operation only waits for other processes.
        """
        self._now = (operation, waits, time.monotonic())

    def set_limit(self, limit: str) -> None:
        """Set the time limit in force."""
        if limit != self.limit:
            self.limit = limit
            self.on_limit()

    @contextmanager
    def during(self, operation: str, limit: str) -> Iterator[None]:
        """Record an operation with a time limit of its own."""
        before = self.limit
        self.begin(operation)
        self.set_limit(limit)
        try:
            yield
        finally:
            self.begin(f"what follows the {operation}")
            self.set_limit(before)

    def now(self) -> tuple[str, bool, float]:
        """Return the operation, whether it only waits, and its duration so far in seconds."""
        operation, waits, since = self._now
        return operation, waits, time.monotonic() - since
