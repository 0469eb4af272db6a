"""Functions that the ranks of the GPU tests run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from infini_train.cli.configuration import read_config
from infini_train.config import LayoutConfig
from infini_train.parallel.layout import initialize_process_group
from infini_train.runtime.errors import AgreedError
from infini_train.training import self_test

CONFIGS = Path(__file__).parents[2] / "configs"


def found_by_self_test(name: str, precision: str) -> str | None:
    """Return the error that the self-test of a shipped configuration finds on one device, or None."""
    initialize_process_group()
    run = replace(read_config(CONFIGS / name), layout=LayoutConfig(zero_stage=1))
    try:
        self_test._test_precision(run, precision)  # type: ignore[arg-type]
    except AgreedError as error:
        return str(error)
    return None
