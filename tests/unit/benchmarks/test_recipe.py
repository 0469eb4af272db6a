"""Recipes add to their record and weights and never replace them. The tests replace the runs by fixed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import recipe
from infini_train.runtime.errors import UserError

CONFIG = Path(__file__).parents[3] / "configs" / "passkey-cpu.yaml"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cell = {"length": 512, "depth": 0.5, "token_accuracy": 1.0}
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)
    monkeypatch.setattr(recipe.Seed, "train", lambda self: None)
    monkeypatch.setattr(recipe.Seed, "evaluate", lambda self: None)
    monkeypatch.setattr(recipe.Seed, "record", lambda self: {"seed": self.seed, "cells": [cell]})
    monkeypatch.setattr(recipe.Seed, "keep_weights", lambda self, target: (target.mkdir(), (target / "new").touch()))
    return tmp_path


def record(results: Path, settings: object) -> bytes:
    (results / "passkey-cpu").mkdir()
    (results / "passkey-cpu" / "seed-11.safetensors").touch()
    path = results / "passkey-cpu.json"
    path.write_text(json.dumps({"settings": settings, "seeds": [{"seed": 11, "cells": []}]}))
    return path.read_bytes()


def test_seeds_are_added_and_weights_are_kept(results):
    record(results, yaml.safe_load(CONFIG.read_text()))
    recipe.run_recipe(CONFIG, [11, 12], processes=1)
    assert [each["seed"] for each in json.loads((results / "passkey-cpu.json").read_text())["seeds"]] == [11, 12]
    assert [path.name for path in (results / "passkey-cpu").iterdir()] == ["seed-11.safetensors"]


def test_seeds_from_concurrent_processes_are_all_kept(results, monkeypatch):
    """Another process adds its seed while this process trains."""
    monkeypatch.setattr(recipe.Seed, "train", lambda self: record(results, yaml.safe_load(CONFIG.read_text())))
    recipe.run_recipe(CONFIG, [3], processes=1)
    assert [each["seed"] for each in json.loads((results / "passkey-cpu.json").read_text())["seeds"]] == [3, 11]


def test_the_first_seed_saves_its_weights(results):
    recipe.run_recipe(CONFIG, [3], processes=1)
    assert (results / "passkey-cpu" / "new").exists()


def test_a_record_of_other_settings_is_refused(results):
    before = record(results, {"training": {"steps": 1}})
    with pytest.raises(UserError, match=r"passkey-cpu.json has seeds of other settings; first move it and"):
        recipe.run_recipe(CONFIG, [12], processes=1)
    assert (results / "passkey-cpu.json").read_bytes() == before
    assert (results / "passkey-cpu" / "seed-11.safetensors").exists()


def test_committed_records_match_their_configuration():
    """A recipe is refused if its configuration has changed since its record was written."""
    for path in sorted((CONFIG.parents[1] / "benchmarks" / "results").glob("passkey-*.json")):
        assert json.loads(path.read_text())["settings"] == yaml.safe_load((CONFIG.parent / f"{path.stem}.yaml").read_text())
