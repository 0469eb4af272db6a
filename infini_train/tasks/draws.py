"""Random choices that are stable between versions of numpy, with separate seeds for each purpose."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Purpose(IntEnum):
    """Use of a sample. It is the first number of the seed's spawn key, so that samples of two purposes never share a seed."""

    TRAIN = 0
    HELD_OUT = 1
    EVALUATION = 2
    TOKENIZER = 3


def sample_seed(seed: int, purpose: Purpose, *index: int) -> np.random.SeedSequence:
    """Return the seed of one sample.

    Args:
        seed: seed of the run or of the evaluation.
        index: numbers that identify the sample within its purpose.
    """
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *index))


class Draws:
    """A stream of random choices.

    It uses only the raw bits of PCG64. numpy keeps them stable between versions, but not the methods of its Generator.
    """

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._bits = np.random.PCG64(seed)

    def fraction(self) -> float:
        """Draw a number uniformly from [0, 1)."""
        return int(self._bits.random_raw() >> 11) / 2**53

    def between(self, lowest: int, highest: int) -> int:
        """Draw an integer uniformly from lowest .. highest, both inclusive."""
        return lowest + int(self._bits.random_raw()) % (highest - lowest + 1)

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def distinct(self, items: Sequence[T], count: int) -> list[T]:
        """Draw `count` different items, in random order."""
        rest = list(items)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(count)]

    def digits(self, count: int) -> str:
        return "".join(str(self.between(0, 9)) for _ in range(count))
