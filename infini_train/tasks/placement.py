"""Placement of the queried needle (the one that the question asks for) in the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infini_train.tasks.draws import Draws

LATE_DEPTH = 0.85
"""Depth from which a needle counts as late."""
LAST_SEGMENTS = 3
"""Number of segments before the question in which `training_placement` puts the needles of border_share."""


@dataclass(frozen=True)
class Haystack:
    """Sizes of a text without the queried needle: an introduction, filler with other needles, and the question.

    Attributes:
        head: tokens before the filler.
        filler: tokens of filler.
        needle: tokens of the queried needle.
        question: tokens of the question; the answer follows it.
        before: tokens of the needles that are always before the queried needle.
        others: (offset in the filler, tokens) of the other needles, sorted by offset.
    """

    head: int
    filler: int
    needle: int
    question: int = 0
    before: int = 0
    others: tuple[tuple[int, int], ...] = ()

    @property
    def last_start(self) -> int:
        """Position of the queried needle if it is directly before the question."""
        return self.head + self.before + sum(tokens for _, tokens in self.others) + self.filler

    def start(self, offset: int) -> int:
        """Return the position of the queried needle's first token in the text, if `offset` tokens of filler are before it."""
        return self.head + self.before + offset + sum(tokens for other, tokens in self.others if other <= offset)

    def offset(self, start: int) -> int:
        """Return the largest offset whose `start` is at or before this position; 0 if there is none.

        The needle then starts exactly at the position, unless the position is inside another needle.
        """
        low, high = 0, self.filler
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.start(middle) <= start else (low, middle - 1)
        return low


Placement = Callable[[Haystack, Draws], int]
"""Function that chooses the number of filler tokens before the queried needle, 0 .. haystack.filler."""


def at_depth(depth: float) -> Placement:
    """Place the needle after this fraction of the filler: 0 directly after the introduction, 1 directly before the question."""
    return lambda haystack, draws: round(depth * haystack.filler)


def training_placement(late_share: float, border_share: float, own_segment_share: float, segment_length: int) -> Placement:
    """Draw placements from a mixture of distributions. The remaining needles are uniform over the whole filler.

    Args:
        late_share: fraction of needles that are uniform over the last 15% of the filler.
        border_share: fraction of needles in the last three segments before the question. Half of them cross a border between
            two segments.
        own_segment_share: fraction of needles in the segment that predicts the first answer token. A needle that does not fit
            there is directly before the question.
        segment_length: tokens per segment; the text begins at a segment start.
    """

    def place(haystack: Haystack, draws: Draws) -> int:
        kind = draws.fraction()
        if kind < border_share:
            if draws.fraction() < 0.5:
                return _across_border(haystack, draws, segment_length)
            return haystack.offset(
                draws.between(max(0, haystack.last_start - LAST_SEGMENTS * segment_length), haystack.last_start)
            )
        kind -= border_share
        if kind < own_segment_share:
            last_read = haystack.last_start + haystack.needle + haystack.question - 1
            border = last_read // segment_length * segment_length
            if border > haystack.last_start:
                return haystack.filler
            return haystack.offset(draws.between(max(border, haystack.start(0)), haystack.last_start))
        kind -= own_segment_share
        first = round(LATE_DEPTH * haystack.filler) if kind < late_share else 0
        return draws.between(first, haystack.filler)

    return place


def _across_border(haystack: Haystack, draws: Draws, segment_length: int) -> int:
    """Draw an offset at which the needle crosses one of the last segment borders before the question."""
    inside = draws.between(1, max(1, min(haystack.needle, segment_length) - 1))
    last = (haystack.last_start + inside) // segment_length
    border = last - draws.between(0, min(LAST_SEGMENTS, last) - 1) if last else 0
    return haystack.offset(max(0, border * segment_length - inside))
