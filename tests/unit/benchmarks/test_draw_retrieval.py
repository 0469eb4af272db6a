"""The picture of the README is what benchmarks/draw_retrieval.py makes of the committed record."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.draw_retrieval import draw

ROOT = Path(__file__).parents[3]


def test_the_picture_is_drawn_from_the_record(tmp_path):
    record = json.loads((ROOT / "benchmarks" / "results" / "passkey-cpu.json").read_text(encoding="utf-8"))
    draw(record, tmp_path / "retrieval.svg")
    assert (tmp_path / "retrieval.svg").read_bytes() == (ROOT / "docs" / "images" / "retrieval.svg").read_bytes()
