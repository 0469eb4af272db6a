"""Where in its text the asked needle stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infini_train.tasks.draws import Draws

LATE_DEPTH = 0.85
LAST_SEGMENTS = 3
"""Segments before the question that count as the last ones."""


@dataclass(frozen=True)
class Room:
    """A text that lacks the asked needle: an introduction, filler with other needles in it, the question.

    Attributes:
        head: tokens before the filler.
        filler: tokens of filler.
        needle: tokens of the asked needle.
        question: tokens of the question, which the answer follows.
        before: tokens of the needles that stand before it wherever it is.
        others: (offset in the filler, tokens) of the other needles, by rising offset.
    """

    head: int
    filler: int
    needle: int
    question: int = 0
    before: int = 0
    others: tuple[tuple[int, int], ...] = ()

    @property
    def last_start(self) -> int:
        """Position of the asked needle where the question follows it."""
        return self.head + self.before + sum(tokens for _, tokens in self.others) + self.filler

    def start(self, offset: int) -> int:
        """Position in the text of the asked needle's first token, if so much filler is before it."""
        return self.head + self.before + offset + sum(tokens for other, tokens in self.others if other <= offset)

    def offset(self, start: int) -> int:
        """The largest offset whose `start` is not beyond this position; 0 if there is none.

        It is exact unless the position lies inside another needle.
        """
        low, high = 0, self.filler
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.start(middle) <= start else (low, middle - 1)
        return low


Placement = Callable[[Room, Draws], int]
"""Chooses the filler tokens before the asked needle, 0 .. room.filler."""


def at_depth(depth: float) -> Placement:
    """The needle after this share of the filler: 0 right behind the introduction, 1 right before the question."""
    return lambda room, draws: round(depth * room.filler)


def training_placement(late_share: float, border_share: float, own_segment_share: float, segment_length: int) -> Placement:
    """A mixture of depths.

    Args:
        late_share: share of needles that are uniform over the last 15% of the filler.
        border_share: share of needles in the last three segments before the question, every second of them across a border
            between two segments.
        own_segment_share: share of needles in the segment in which the answer is read, if one fits in there, and right before
            the question if not. What is left is uniform over the whole filler.
        segment_length: tokens of a segment; the text begins at a segment's start.
    """

    def place(room: Room, draws: Draws) -> int:
        kind = draws.fraction()
        if kind < border_share:
            if draws.fraction() < 0.5:
                return _across_border(room, draws, segment_length)
            return room.offset(draws.between(max(0, room.last_start - LAST_SEGMENTS * segment_length), room.last_start))
        kind -= border_share
        if kind < own_segment_share:
            last_read = room.last_start + room.needle + room.question - 1
            border = last_read // segment_length * segment_length
            if border > room.last_start:
                return room.filler
            return room.offset(draws.between(max(border, room.start(0)), room.last_start))
        kind -= own_segment_share
        first = round(LATE_DEPTH * room.filler) if kind < late_share else 0
        return draws.between(first, room.filler)

    return place


def _across_border(room: Room, draws: Draws, segment_length: int) -> int:
    """An offset at which the needle's tokens lie in two segments, among the last borders before the question."""
    inside = draws.between(1, max(1, min(room.needle, segment_length) - 1))
    last = (room.last_start + inside) // segment_length
    border = last - draws.between(0, min(LAST_SEGMENTS, last) - 1) if last else 0
    return room.offset(max(0, border * segment_length - inside))
