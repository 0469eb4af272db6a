"""What this process is doing right now, for whoever wants to know why it does not go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """The operation in progress. Written by the thread that trains, read by others: one assignment replaces all of it."""

    def __init__(self, operation: str) -> None:
        self.limit = "first_step"
        """Which time limit counts: first_step, step or save (see HealthConfig). Changed by `set_limit`."""
        self.on_limit: Callable[[], None] = lambda: None
        """Called at once when another limit counts, however soon after the operation is over."""
        self.step = 0
        """Number of the step in progress, from 1; 0 before the first."""
        self._now = (operation, False, time.monotonic())

    def begin(self, operation: str, *, waits: bool = False) -> None:
        """Note the operation that begins now.

        Args:
            waits: nothing is done but waiting for other processes.
        """
        self._now = (operation, waits, time.monotonic())

    def set_limit(self, limit: str) -> None:
        """Another time limit counts from now on."""
        if limit != self.limit:
            self.limit = limit
            self.on_limit()

    @contextmanager
    def during(self, operation: str, limit: str) -> Iterator[None]:
        """An operation that has a time limit of its own."""
        before = self.limit
        self.begin(operation)
        self.set_limit(limit)
        try:
            yield
        finally:
            self.begin(f"what follows the {operation}")
            self.set_limit(before)

    def now(self) -> tuple[str, bool, float]:
        """The operation, whether it only waits, and the seconds that it has taken so far."""
        operation, waits, since = self._now
        return operation, waits, time.monotonic() - since
