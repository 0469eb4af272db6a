"""Held-out loss by position: ranges of segments and what stands for each."""

import numpy as np

from infini_train.evaluation.commands import _by_position
from infini_train.evaluation.perplexity import MAX_POSITIONS, HeldOutLoss, position_bins


def result(segments: int) -> HeldOutLoss:
    """A loss of n nats in segment n, of two tokens each but for the last range, where more stand."""
    tokens = np.zeros(MAX_POSITIONS)
    np.add.at(tokens, np.minimum(np.arange(segments), MAX_POSITIONS - 1), 2.0)
    return HeldOutLoss(np.arange(MAX_POSITIONS) * tokens, tokens, tokens)


def test_ranges_double_and_hold_every_token() -> None:
    assert position_bins(result(0)) == []
    assert position_bins(result(1)) == [(0, 0)]
    assert position_bins(result(7)) == [(0, 0), (1, 1), (2, 3), (4, 7)]
    rows = _by_position(result(7), None, None)
    assert [row["tokens"] for row in rows] == [2, 2, 4, 6]
    assert [row["loss"] for row in rows] == [0.0, 1.0, 2.5, 5.0]


def test_the_last_range_has_no_end_where_longer_documents_count_with_it() -> None:
    found = result(3 * MAX_POSITIONS)
    assert position_bins(found)[-2:] == [(MAX_POSITIONS // 4, MAX_POSITIONS // 2 - 1), (MAX_POSITIONS // 2, None)]
    last = _by_position(found, None, None)[-1]
    assert last["last_segment"] is None and last["tokens"] == 2 * (3 * MAX_POSITIONS - MAX_POSITIONS // 2)
