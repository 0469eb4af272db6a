"""The warning about a held-out split that is too small, and the fraction that it recommends."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.config import DataConfig, ModelConfig, RunConfig, TaskConfig, TrainingConfig
from infini_train.data import held_out
from infini_train.data.held_out import held_out_warning
from infini_train.data.preparation import prepare


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """60 documents of 40 to 2,400 repeats of a phrase. About one in six is held out."""
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"chapter {i}\n" + f"of book {i} " * 40 * (i + 1))
    data = DataConfig(source=str(tmp_path / "text"), path=str(tmp_path / "data"), vocab_size=280, held_out_fraction=0.15)
    return RunConfig(model=ModelConfig(segment_length=16), data=data, training=TrainingConfig(rows=4))


def test_no_warning_for_a_large_enough_split(run, monkeypatch, capsys):
    monkeypatch.setattr(held_out, "MIN_TOKENS", 1000)
    prepare(run)
    assert held_out_warning(run) is None and "warning" not in capsys.readouterr().err


def test_warning_names_each_problem(run, capsys, monkeypatch):
    prepare(run)
    monkeypatch.setattr(held_out, "MIN_TOKENS", 10**7)
    words = str(held_out_warning(run))
    assert "tokens, and below 10,000,000 a loss is uncertain" in words and "give more text" in words
    monkeypatch.setattr(held_out, "MIN_TOKENS", 1000)
    many = replace(run, training=replace(run.training, rows=20))
    assert "than training.rows (20)" in str(held_out_warning(many))
    wide = replace(run, model=replace(run.model, segment_length=1 << 20))
    words = str(held_out_warning(wide))
    assert "no document of more than two segments of 1048576" in words and words.count("\n") == 0
    assert held_out_warning(replace(wide, model=replace(wide.model, attention="full"))) is None


def test_recommended_fraction_is_large_enough(run, capsys, monkeypatch):
    monkeypatch.setattr(held_out, "MIN_TOKENS", 1000)
    run = replace(run, training=replace(run.training, rows=12))
    prepare(run)
    (fraction,) = re.findall(r"set data.held_out_fraction to ([\d.]+), and run `infini-train prepare", capsys.readouterr().err)
    run = replace(run, data=replace(run.data, held_out_fraction=float(fraction)))
    prepare(run, overwrite=True)
    assert "warning" not in capsys.readouterr().err


def test_no_warning_for_task_samples(run, capsys):
    task = TaskConfig(kind="passkey", samples=8, held_out_samples=2, min_tokens=140, max_tokens=200)
    prepare(replace(run, task=task, data=replace(run.data, vocab_size=384)))
    assert "warning" not in capsys.readouterr().err
