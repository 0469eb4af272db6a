"""Random choices that stay the same between versions of numpy, from seeds that no two purposes share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Purpose(IntEnum):
    """What a sample is for. It is the first number of the seed's spawn key, so that purposes never share a sample's seed."""

    TRAIN = 0
    HELD_OUT = 1
    EVALUATION = 2
    TOKENIZER = 3


def sample_seed(seed: int, purpose: Purpose, *index: int) -> np.random.SeedSequence:
    """The seed of one sample.

    Args:
        seed: of the run or of the evaluation.
        index: numbers that tell the sample from the others of its purpose.
    """
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *index))


class Draws:
    """A stream of choices.

    It uses the raw bits of PCG64 alone: numpy promises those between versions, and not what its Generator makes of them.
    """

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._bits = np.random.PCG64(seed)

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        return int(self._bits.random_raw() >> 11) / 2**53

    def between(self, lowest: int, highest: int) -> int:
        """Uniform among lowest .. highest, both included."""
        return lowest + int(self._bits.random_raw()) % (highest - lowest + 1)

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def distinct(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(count)]

    def digits(self, count: int) -> str:
        return "".join(str(self.between(0, 9)) for _ in range(count))
