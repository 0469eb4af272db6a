"""A job array: one run for every combination of the values of some keys."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

from jsonargparse import ArgumentError, ArgumentParser

from infini_train.config import RunConfig
from infini_train.errors import UserError


def sweep_runs(run: RunConfig, sweeps: list[str]) -> list[RunConfig]:
    """Runs of an array, in RUN/task_0, RUN/task_1 and so on; the last key's values change fastest.

    Args:
        run: what the runs have in common; its run_dir holds theirs.
        sweeps: KEY=VALUE,VALUE,... each.

    Raises:
        UserError: a sweep without values, of an unknown key, or with a value that the key does not take.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UserError(f"--sweep names {next(key for key in keys if keys.count(key) > 1)} twice; give all its values in one")
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    runs = []
    for number, values in enumerate(product(*(values for _, values in axes))):
        overrides = [f"--{key}={value}" for key, value in zip(keys, values, strict=True)]
        overrides.append(f"--run_dir={run.run_dir}/task_{number}")
        try:
            parsed = parser.parse_args(overrides, namespace=parser.parse_object(asdict(run)))
        except ArgumentError as error:
            raise UserError(f"--sweep {' '.join(overrides[:-1])}: {' '.join(str(error).split())}") from error
        instantiated = parser.instantiate_classes(parsed)
        runs.append(RunConfig(**{name: instantiated[name] for name in RunConfig.__dataclass_fields__}))
    return runs


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, separator, values = sweep.partition("=")
    if not separator or not key or not all(values.split(",")):
        raise UserError(f"--sweep is {sweep!r}; write KEY=VALUE,VALUE, for example optimizer.learning_rate=1e-3,3e-4")
    if key == "run_dir":
        raise UserError("--sweep names run_dir; each run of an array gets a folder of its own in it already")
    return key, values.split(",")
