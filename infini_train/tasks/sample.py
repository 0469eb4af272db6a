"""A sample: a text of an exact length. It can be read at any position, so a text of a million tokens is never built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class _Source(Protocol):
    def read(self, start: int, count: int) -> np.ndarray: ...


class FixedTokens:
    """A source of fixed tokens, in contrast to the endless filler."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.asarray(tokens, dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


@dataclass(frozen=True)
class Span:
    """`length` tokens of a source, starting at token `first`."""

    source: _Source
    first: int
    length: int


@dataclass(frozen=True)
class Sample:
    """A text from the begin token to the last token of the answer.

    Attributes:
        spans: consecutive spans of the text.
        answer_start: position of the answer's first token.
        answer: [answer_length] int64.
        scored: [answer_length] bool, whether the token is scored; separators inside an answer are not scored.
        facts: description of the sample for records: the task, the needle, the needle positions, the question and the answer.
    """

    spans: tuple[Span, ...]
    answer_start: int
    answer: np.ndarray
    scored: np.ndarray
    facts: dict[str, Any]

    @property
    def answer_length(self) -> int:
        return len(self.answer)

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return self.answer_start + self.answer_length

    @property
    def tokens(self) -> np.ndarray:
        """The whole text, [length] int64."""
        return self.read(0, self.length)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start + count - 1, [count] int64, with time and host memory proportional to `count`.

        Raises:
            IndexError: if the text does not have these tokens.
        """
        if start < 0 or count < 0 or start + count > self.length:
            raise IndexError(f"tokens {start} to {start + count} of a text of {self.length}")
        found, place = [np.empty(0, dtype=np.int64)], 0
        for span in self.spans:
            low, high = max(start, place), min(start + count, place + span.length)
            if low < high:
                found.append(span.source.read(span.first + low - place, high - low))
            place += span.length
        return np.concatenate(found)
