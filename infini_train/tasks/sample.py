"""One sample: a text of an exact length that can be read at any place, so that a million tokens never have to exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class _Source(Protocol):
    def read(self, start: int, count: int) -> np.ndarray: ...


class Fixed:
    """Tokens that stand in the text as they are."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.asarray(tokens, dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


@dataclass(frozen=True)
class Part:
    """`length` tokens of a source, from `first` on."""

    source: _Source
    first: int
    length: int


@dataclass(frozen=True)
class Sample:
    """A text, [begin] to the last token of the answer.

    Attributes:
        answer_start: position of the answer's first token.
        answer: [answer_length] int64.
        scored: [answer_length] bool; a separator between the parts of an answer is not scored.
        facts: what the text says and asks, for people: needles with their positions, question, answer.
    """

    parts: tuple[Part, ...]
    answer_start: int
    answer: np.ndarray
    scored: np.ndarray
    facts: dict[str, Any]

    @property
    def answer_length(self) -> int:
        return len(self.answer)

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.answer_start + self.answer_length

    @property
    def tokens(self) -> np.ndarray:
        """The whole text, [length] int64."""
        return self.read(0, self.length)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 in time and memory of `count`, [count] int64.

        Raises:
            IndexError: if the text does not have these tokens.
        """
        if start < 0 or count < 0 or start + count > self.length:
            raise IndexError(f"tokens {start} to {start + count} of a text of {self.length}")
        found, place = [np.empty(0, dtype=np.int64)], 0
        for part in self.parts:
            low, high = max(start, place), min(start + count, place + part.length)
            if low < high:
                found.append(part.source.read(part.first + low - place, high - low))
            place += part.length
        return np.concatenate(found)
