"""Ignore write errors on stdout and stderr.

A failed print must not end a run: the disk of its log may be full, or the reader of its pipe may have exited.
"""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from typing import Any


class _ErrorIgnoringStream:
    """A proxy of a text stream that drops text which cannot be written, instead of raising OSError."""

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


def replace_unencodable_characters() -> None:
    """Print ? for each character that the encoding of stdout lacks: the locale may not be UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # `reconfigure` flushes the buffered text first
            sys.stdout.reconfigure(errors="replace")


def ignore_stream_errors() -> None:
    """Ignore OSError in every later write to stdout and stderr; safe to call more than once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _ErrorIgnoringStream):
            setattr(sys, name, _ErrorIgnoringStream(stream))
