"""A job array: one run for every combination of the values of some keys."""

from __future__ import annotations

from itertools import product

from infini_train.config import RunConfig
from infini_train.config.overrides import with_overrides
from infini_train.runtime.errors import UserError


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
    runs = []
    for number, values in enumerate(product(*(values for _, values in axes))):
        changes = dict(zip(keys, values, strict=True))
        where = "--sweep " + " ".join(f"{key}={value}" for key, value in changes.items())
        runs.append(with_overrides(run, {**changes, "run_dir": f"{run.run_dir}/task_{number}"}, where))
    return runs


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, separator, values = sweep.partition("=")
    if not separator or not key or not all(values.split(",")):
        raise UserError(f"--sweep is {sweep!r}; write KEY=VALUE,VALUE, for example optimizer.learning_rate=1e-3,3e-4")
    if key == "run_dir":
        raise UserError("--sweep names run_dir; each run of an array gets a folder of its own in it already")
    return key, values.split(",")
