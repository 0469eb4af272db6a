"""Held-out loss by position: segment ranges and their losses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infini_train.evaluation.commands import _by_position, _print_evaluation, _summary
from infini_train.measurement.perplexity import MAX_POSITIONS, HeldOutLoss, position_bins
from infini_train.report.run_report import write_report
from infini_train.report.summary import summary_lines
from infini_train.runtime.files import write_json


def result(segments: int) -> HeldOutLoss:
    """Return losses of n nats in segment n with two tokens each. The last position also counts all later segments."""
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


def test_the_last_range_is_open_for_documents_longer_than_max_positions() -> None:
    found = result(3 * MAX_POSITIONS)
    assert position_bins(found)[-2:] == [(MAX_POSITIONS // 4, MAX_POSITIONS // 2 - 1), (MAX_POSITIONS // 2, None)]
    last = _by_position(found, None, None)[-1]
    assert last["last_segment"] is None and last["tokens"] == 2 * (3 * MAX_POSITIONS - MAX_POSITIONS // 2)


def diverged(last_loss: float) -> dict[str, Any]:
    """Return an evaluation.json with a loss of 20 in the first segment and of `last_loss` in the second."""
    tokens = np.full(2, 8.0)
    found = HeldOutLoss(np.array([20.0, last_loss]) * tokens, tokens, tokens)
    whole = _summary(found, found.loss)
    return {
        "checkpoint": "step_00000001",
        "step": 1,
        "tokens": 16,
        "with_memory": whole,
        "memory_emptied": None,
        "memory_shuffled": None,
        "unigram_entropy": 4.5,
        "by_position": _by_position(found, None, None),
        "read_back": None,
    }


def test_the_loss_of_a_diverged_model_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its perplexity exceeds the range of a float."""
    report = diverged(1e6)
    _print_evaluation(report)
    printed = capsys.readouterr().out
    assert "485165195.410" in printed and "1.01e+304" in printed and "held-out loss 500010.0000" in printed
    write_json(tmp_path / "evaluation.json", report)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1e6}) + "\n")
    assert summary_lines(tmp_path)[-1] == "held-out perplexity (evaluation of step 1): 1.01e+304"
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "its perplexity is 1.01e+304" in page


def test_nan_losses_are_null_in_valid_json(tmp_path: Path) -> None:
    _print_evaluation(diverged(float("nan")))
    write_json(tmp_path / "evaluation.json", diverged(float("nan")))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert written["with_memory"]["loss"] is None and [row["loss"] for row in written["by_position"]] == [20.0, None]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None}) + "\n")
    assert summary_lines(tmp_path) == ["unigram entropy of the held-out text: 4.500 nats per token"]
    assert "its perplexity is" not in write_report(tmp_path).read_text(encoding="utf-8")
