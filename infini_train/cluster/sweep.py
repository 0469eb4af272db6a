"""`--sweep`: the runs of a job array, one for every combination of values."""

from __future__ import annotations

from itertools import product

from infini_train.config import RunConfig
from infini_train.config.overrides import with_overrides
from infini_train.runtime.errors import UserError


def sweep_runs(run: RunConfig, sweeps: list[str]) -> list[RunConfig]:
    """Return the runs of an array, in RUN/task_0, RUN/task_1 and so on. The values of the last key change fastest.

    Args:
        run: common configuration of the runs. Its run_dir contains theirs.
        sweeps: one text KEY=VALUE,VALUE,... per key.

    Raises:
        UserError: a sweep has no values, an unknown key, or a value that the key does not accept.
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
        raise UserError("--sweep names run_dir; each run of an array already gets its own folder in run_dir")
    return key, values.split(",")
