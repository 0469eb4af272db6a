"""A retrieval recipe from nothing, once a seed: data, training, accuracy by length and depth, and all of it in one record.

    python -m benchmarks.recipe configs/passkey-cpu.yaml --seeds 1 2 3

What is finished stays in runs/, so that the same command goes on where it was stopped, and a seed that is in the record under
the same settings is not run again. The seed is that of the data and of the weights; evaluation texts have seeds of their own
under the same number, which no training text shares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.run import RESULTS, environment
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.cli import read_config
from infini_train.config import RunConfig
from infini_train.data.manifest import MANIFEST_FILE, TOKENIZER_FILE
from infini_train.errors import UserError
from infini_train.evaluation.compare import run_to_its_end
from infini_train.evaluation.records import read_metrics

LONG = 1 << 20
"""From this length on a cell has LONG_SAMPLES texts."""
SAMPLES, LONG_SAMPLES = 50, 10
GRIDS = {"short": [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], "long": [0, 0.25, 0.5, 0.75, 1]}


class Seed:
    """One seed of a recipe and its folder.

    Args:
        config: YAML file of the recipe.
        folder: holds the data, the run and its evaluations.
        processes: that train.
    """

    def __init__(self, config: Path, run: RunConfig, seed: int, folder: Path, processes: int) -> None:
        self.config, self.run, self.seed, self.folder, self.processes = config, run, seed, folder, processes

    def _call(self, *arguments: str, run_dir: Path, processes: int = 1) -> None:
        command = [sys.executable, "-m", "infini_train"]
        if processes > 1:
            command = [sys.executable, "launch/local.py", str(processes)]
        options = {
            "config": self.config,
            "data.path": self.folder / "data",
            "run_dir": run_dir,
            "task.seed": self.seed,
            "training.seed": self.seed,
            "logging.wandb": "off",
        }
        rest = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        print("recipe:", *arguments, "seed", self.seed, file=sys.stderr, flush=True)
        _run([*command, *arguments[:2], *rest, *arguments[2:]])

    def train(self) -> None:
        """Data and weights, as far as they are not there."""
        if not (self.folder / "data" / MANIFEST_FILE).exists():
            self._call("prepare", "--overwrite", run_dir=self.folder)
        if not self._trained():
            self._call("pretrain", run_dir=self.folder, processes=self.processes)

    def _trained(self) -> Path | None:
        """The checkpoint of the last step."""
        found = [path for path in list_checkpoints(self.folder) if path.name == f"step_{self.run.training.steps:08d}"]
        return found[0] if found else None

    def evaluate(self) -> None:
        """Every cell, as far as it is not there."""
        checkpoint = self._trained()
        assert checkpoint is not None
        for name, depths in GRIDS.items():
            lengths = [length for length in self.run.task.lengths if (length >= LONG) == (name == "long")]
            if not lengths or self._evaluation(name).get("complete"):
                continue
            samples = LONG_SAMPLES if name == "long" else SAMPLES
            self._call(
                *("evaluate", "passkey", "--from_checkpoint", str(checkpoint)),
                *("--task.lengths", json.dumps(lengths), "--task.depths", json.dumps(depths)),
                *("--task.samples_per_cell", str(samples), "--task.rows", str(samples)),
                run_dir=self.folder / name,
            )

    def _evaluation(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "passkey.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def record(self) -> dict[str, Any]:
        """What this seed gave."""
        records = read_metrics(self.folder / "metrics.jsonl")
        return {
            "seed": self.seed,
            "processes": self.processes,
            "steps": self.run.training.steps,
            "tokens": records.last("tokens"),
            "training_minutes": float(records.finite("step_seconds").sum()) / 60,
            **environment(),
            "cells": [cell for name in GRIDS for cell in self._evaluation(name).get("cells", [])],
        }

    def keep_weights(self, target: Path) -> None:
        """Copy weights and tokenizer to a folder from which `evaluate passkey --from_checkpoint` can measure again."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.copy(self.folder / "data" / TOKENIZER_FILE, target)
        output = str(target / f"seed-{self.seed}.safetensors")
        command = [sys.executable, "-m", "infini_train", "checkpoint", "consolidate", "--run_dir", str(self.folder)]
        _run([*command, "--output", output])


def _run(command: list[str]) -> None:
    """One command; the program ends with its exit code where that is not 0, after it has said why itself."""
    if code := run_to_its_end(command):
        if code != UserError.exit_code:
            print(f"recipe: ended with {code}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def recorded_seeds(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What a record holds of these settings; nothing where it is of others, or is none."""
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return report["seeds"] if report.get("settings") == settings else []


def show(name: str, records: list[dict[str, Any]]) -> None:
    """Token accuracy in per cent, of the worst seed and over all seeds, lengths down and depths across."""
    by_place: dict[tuple[int, float], list[float]] = {}
    for record in records:
        for cell in record["cells"]:
            by_place.setdefault((cell["length"], cell["depth"]), []).append(100 * cell["token_accuracy"])
    depths = sorted({depth for _, depth in by_place})
    table = Table("tokens", *(f"{depth:g}" for depth in depths), title=f"{name}: worst seed / mean of {len(records)}, by depth")
    for length in sorted({length for length, _ in by_place}):
        cells = [by_place.get((length, depth)) for depth in depths]
        table.add_row(f"{length:,}", *("-" if not x else f"{min(x):.1f} / {sum(x) / len(x):.1f}" for x in cells))
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=2, help="that train; evaluation takes one")
    arguments = parser.parse_args()
    try:
        run = read_config(arguments.config)
    except UserError as error:
        print(f"recipe: error: {error}", file=sys.stderr)
        return UserError.exit_code
    name, settings = arguments.config.stem, yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    path = RESULTS / f"{name}.json"
    records = recorded_seeds(path, settings)
    for seed in arguments.seeds:
        if any(record["seed"] == seed for record in records):
            print(f"recipe: seed {seed} is in {path}", file=sys.stderr)
            continue
        each = Seed(arguments.config, run, seed, Path("runs") / name / f"seed-{seed}", arguments.processes)
        each.train()
        each.evaluate()
        records.append(each.record())
        if not records[1:]:
            each.keep_weights(RESULTS / name)
        report = {"config": str(arguments.config), "settings": settings, "seeds": records}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(name, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
