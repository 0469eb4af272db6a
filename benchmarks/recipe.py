"""Run a retrieval recipe from scratch for several seeds: prepare data, train, evaluate by length and depth, and record.

    python -m benchmarks.recipe configs/passkey-cpu.yaml --seeds 1 2 3

Finished steps stay in runs/, so the same command continues after an interruption. A seed that is already in the record does
not run again. Folders and records of other settings are refused and never replaced. A seed sets the data and the initial
weights. Evaluation texts are derived from the same seed, but never use the random streams of training texts.
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
"""Length in tokens from which a cell has the second number of samples."""
SAMPLES = (50, 10)
GRIDS = {"short": [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], "long": [0, 0.25, 0.5, 0.75, 1]}


class Seed:
    """One seed of a recipe and its folder.

    Args:
        config: YAML file of the recipe.
        run: the configuration in that file.
        seed: seed of the data and the weights.
        folder: folder of the data, the run and its evaluations.
        processes: number of training processes.
        samples: texts per cell for lengths below LONG tokens, and from LONG tokens.
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
        """Prepare the data and train, unless finished already.

        Raises:
            UserError: the folder has a run with other settings.
        """
        if (difference := difference_from(self.folder / "config.yaml", self.seeded_run())) is not None:
            raise UserError(f"{self.folder} belongs to other settings ({difference}); move it away first")
        if not (self.folder / "data" / MANIFEST_FILE).exists():
            self._call("prepare", "--overwrite", run_dir=self.folder)
        if not self._trained():
            self._call("pretrain", run_dir=self.folder, processes=self.processes)

    def seeded_run(self) -> RunConfig:
        """Return the run as `_call` starts it."""
        return replace(
            self.run,
            data=replace(self.run.data, path=str(self.folder / "data")),
            task=replace(self.run.task, seed=self.seed),
            training=replace(self.run.training, seed=self.seed),
        )

    def _trained(self) -> Path | None:
        """Return the checkpoint of the last step, or None."""
        found = [path for path in list_checkpoints(self.folder) if path.name == f"step_{self.run.training.steps:08d}"]
        return found[0] if found else None

    def evaluate(self) -> None:
        """Evaluate all cells, unless finished already."""
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
        """Return the record of this seed: steps, tokens, training time, environment and cells."""
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
        """Copy weights and tokenizer to a new folder, so that `evaluate passkey --from_checkpoint` can repeat the evaluation.

        If another seed has created the folder first, nothing is written.
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
    """Run a command, which prints its own errors. If it fails, exit with its exit code."""
    if code := run_forwarding_signals(command):
        if code != UserError.exit_code:
            print(f"recipe: ended with {code}; the same command continues from there", file=sys.stderr)
        raise SystemExit(code)


def recorded_seeds(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the seeds in a record, or an empty list if the file does not exist.

    Raises:
        UserError: the record has other settings.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise UserError(f"{path} has seeds of other settings; first move it and the folder {path.stem}/ next to it away")
    return report["seeds"]


def show(name: str, records: list[dict[str, Any]]) -> None:
    """Print a table of token accuracy in per cent by length and depth: worst seed and mean of all seeds."""
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
    parser.add_argument("--processes", type=int, default=2, help="number of training processes; evaluation uses one")
    counts = f"texts per cell for lengths below {LONG:,} tokens, and from there on; recorded (default: %(default)s)"
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
    """Run the seeds that are not in the record yet, and print the results.

    Raises:
        UserError: the configuration is invalid, or the record or a seed's folder has other settings.
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
            # Read the record again, because other seeds may have finished in the meantime.
            others = [record for record in recorded_seeds(path, settings) if record["seed"] != seed]
            records = sorted([*others, each.record()], key=lambda record: record["seed"])
            report = {"config": str(config), "settings": settings, "seeds": records}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(name, records)


if __name__ == "__main__":
    sys.exit(main())
