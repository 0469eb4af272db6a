"""A retrieval recipe from nothing, once a seed: data, training, accuracy by length and depth, and all of it in one record.

    python -m benchmarks.recipe configs/passkey-cpu.yaml --seeds 1 2 3

What is finished stays in runs/, so that the same command goes on where it was stopped, and a seed that is in the record is not
run again; folders and records of other settings are refused, never replaced. The seed is that of the data and of the weights;
evaluation texts have seeds of their own under the same number, which no training text shares.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.run import RESULTS, environment
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.cli.configuration import read_config
from infini_train.config import RunConfig, difference_from
from infini_train.data.manifest import MANIFEST_FILE
from infini_train.evaluation.comparison import run_forwarding_signals
from infini_train.report.compare_record import locked
from infini_train.report.run_results import read_metrics
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.tokenizer import tokenizer_file

LONG = 1 << 20
"""From this length on a cell has the second number of samples."""
SAMPLES = (50, 10)
GRIDS = {"short": [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], "long": [0, 0.25, 0.5, 0.75, 1]}


class Seed:
    """One seed of a recipe and its folder.

    Args:
        config: YAML file of the recipe.
        folder: holds the data, the run and its evaluations.
        processes: that train.
        samples: texts a cell below LONG tokens, and from there on.
    """

    def __init__(
        self, config: Path, run: RunConfig, seed: int, folder: Path, processes: int, samples: tuple[int, int] = SAMPLES
    ) -> None:
        self.config, self.run, self.seed, self.folder, self.processes = config, run, seed, folder, processes
        self.samples = dict(zip(GRIDS, samples, strict=True))

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
        if (difference := difference_from(self.folder / "config.yaml", self.seeded_run())) is not None:
            raise UserError(f"{self.folder} belongs to other settings ({difference}); move it away first")
        if not (self.folder / "data" / MANIFEST_FILE).exists():
            self._call("prepare", "--overwrite", run_dir=self.folder)
        if not self._trained():
            self._call("pretrain", run_dir=self.folder, processes=self.processes)

    def seeded_run(self) -> RunConfig:
        """The run as `_call` starts it."""
        return replace(
            self.run,
            data=replace(self.run.data, path=str(self.folder / "data")),
            task=replace(self.run.task, seed=self.seed),
            training=replace(self.run.training, seed=self.seed),
        )

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
            samples = self.samples[name]
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
        """Copy weights and tokenizer to a new folder from which `evaluate passkey --from_checkpoint` can measure again.

        Where another seed was first, nothing is left.
        """
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            shutil.copy(tokenizer_file(self.folder / "data"), folder)
            output = str(Path(folder) / f"seed-{self.seed}.safetensors")
            command = [sys.executable, "-m", "infini_train", "checkpoint", "consolidate", "--run_dir", str(self.folder)]
            _run([*command, "--output", output])
            with suppress(FileExistsError):
                target.mkdir()
                for file in Path(folder).iterdir():
                    shutil.copy(file, target)


def _run(command: list[str]) -> None:
    """One command; the program ends with its exit code where that is not 0, after it has said why itself."""
    if code := run_forwarding_signals(command):
        if code != UserError.exit_code:
            print(f"recipe: ended with {code}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def recorded_seeds(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What a record holds; nothing where there is none.

    Raises:
        UserError: it is of other settings.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise UserError(f"{path} holds seeds of other settings; move it and the folder {path.stem}/ beside it away first")
    return report["seeds"]


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
    counts = f"texts a cell below {LONG:,} tokens, and from there on; the record has them (default: %(default)s)"
    parser.add_argument("--samples", type=int, nargs=2, default=SAMPLES, metavar=("SHORT", "LONG"), help=counts)
    arguments = parser.parse_args()
    try:
        if min(arguments.samples) < 1:
            raise UserError(f"--samples is {arguments.samples}; each must be at least 1")
        run_recipe(arguments.config, arguments.seeds, arguments.processes, tuple(arguments.samples))
    except UserError as error:
        print(f"recipe: error: {error}", file=sys.stderr)
        return UserError.exit_code
    return 0


def run_recipe(config: Path, seeds: list[int], processes: int, samples: tuple[int, int] = SAMPLES) -> None:
    """Run what is not in the record yet, and show it.

    Raises:
        UserError: the configuration is wrong, or the record or a seed's folder is of another one.
    """
    run = read_config(config)
    name, settings = config.stem, yaml.safe_load(config.read_text(encoding="utf-8"))
    path = RESULTS / f"{name}.json"
    records = recorded_seeds(path, settings)
    for seed in seeds:
        if any(record["seed"] == seed for record in records):
            print(f"recipe: seed {seed} is in {path}", file=sys.stderr)
            continue
        each = Seed(config, run, seed, Path("runs") / name / f"seed-{seed}", processes, samples)
        each.train()
        each.evaluate()
        if not (RESULTS / name).exists():
            each.keep_weights(RESULTS / name)
        with locked(RESULTS):
            # Read again: other seeds may have been run at the same time.
            others = [record for record in recorded_seeds(path, settings) if record["seed"] != seed]
            records = sorted([*others, each.record()], key=lambda record: record["seed"])
            report = {"config": str(config), "settings": settings, "seeds": records}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(name, records)


if __name__ == "__main__":
    sys.exit(main())
