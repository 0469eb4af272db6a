"""Filler: the text around the needles. It is an endless sequence that can be read at any position without building it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infini_train.runtime.errors import UserError
from infini_train.tokenizers.tokenizer import Tokenizer

SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Filler text of Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), section 4.2.

The Infini-attention paper uses the same text.
"""


class TextFiller:
    """Filler of real text. It repeats if a sample is longer than the text.

    Args:
        tokens: [n] token ids of one or more documents, one after another.
    """

    starts_anywhere = True
    """Whether a sample starts reading the filler at a random position."""

    def __init__(self, tokens: np.ndarray | Sequence[int]) -> None:
        self._tokens = np.asarray(tokens)
        if not len(self._tokens):
            raise UserError("task.filler is text, but there is no text to take it from; give more documents in data.source")

    @property
    def period(self) -> int:
        """Number of tokens after which the filler repeats."""
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start + count - 1 of the endless repetition, [count] int64."""
        start %= self.period
        return self._tokens[np.arange(start, start + count) % self.period].astype(np.int64)


class RepeatedFiller(TextFiller):
    """Filler that repeats the sentences of the passkey task."""

    starts_anywhere = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.encode(SENTENCES + " "))
