"""What a run says must not end it: its log may be on a disk that is full, and what reads it through a pipe may be gone."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import Any


class _Unfailing:
    """A text stream of which what cannot be written is lost, and no more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def replace_characters() -> None:
    """Print ? for what the terminal's encoding does not have: a locale may be older than UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # of what stands in it, which is written first
            sys.stdout.reconfigure(errors="replace")


def let_words_be_lost() -> None:
    """From here on no line that is printed raises for want of room or of a reader."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Unfailing):
            setattr(sys, name, _Unfailing(stream))
