"""Read and write configuration files. Nothing else in the package reads YAML."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from infini_train.config.schema import RunConfig


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, which every command can read again."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def dump_keys(keys: dict[str, Any]) -> str:
    """Return some keys of a configuration, grouped by section, as YAML."""
    return yaml.safe_dump(keys, sort_keys=False)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the YAML of `dump_config` to a file."""
    path.write_text(dump_config(config), encoding="utf-8")


TRAINING_SECTIONS = ("model", "data", "task", "training", "optimizer")
"""Sections that influence training."""
MEASUREMENT_KEYS = {"task.lengths", "task.depths", "task.samples_per_cell", "task.rows"}
"""Keys of those sections that influence only the measurement."""


def difference_from(path: Path, config: RunConfig) -> str | None:
    """Return the first key in which a saved run was trained differently, with both values; None if there is none.

    Args:
        path: file that `save_config` wrote. A missing file counts as no difference, and a key that the file lacks as its
            default.
        config: configuration to compare with.
    """
    if not path.is_file():
        return None
    return difference(yaml.safe_load(path.read_text(encoding="utf-8")), config)


def difference(saved: dict[str, Any], config: RunConfig, ignored: Collection[str] = ()) -> str | None:
    """Compare a saved configuration with `config` as `difference_from` does.

    Args:
        saved: configuration of the other run, as returned by `dataclasses.asdict`.
        config: configuration to compare with.
        ignored: keys to ignore, as section.key.
    """
    ours = asdict(config)
    for section in TRAINING_SECTIONS:
        for key, value in ours[section].items():
            before = saved.get(section, {}).get(key, getattr(getattr(RunConfig(), section), key))
            if before != value and f"{section}.{key}" not in {*MEASUREMENT_KEYS, *ignored}:
                return f"{section}.{key} is {value}, and was {before}"
    return None


def holds_key(path: Path, key: str) -> bool:
    """Return whether a YAML file has a key, given with dots between sections. False if the file cannot be read."""
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    for name in key.split("."):
        if not isinstance(held, dict) or name not in held:
            return False
        held = held[name]
    return True


def read_steps(path: Path) -> int | None:
    """Return `training.steps` of a file that `save_config` wrote; None if the file is missing or incomplete."""
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["training"]["steps"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError, yaml.YAMLError):
        return None
