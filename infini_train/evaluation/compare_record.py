"""compare.json: what the finished runs of a comparison gave. It stays when their folders are deleted."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infini_train.config import RunConfig, difference
from infini_train.data.dataset import TokenDataset
from infini_train.data.manifest import MANIFEST_FILE
from infini_train.errors import UserError
from infini_train.evaluation.records import read_json
from infini_train.results import COPIED_RUN_DIR, write_json

RESULT_FILE = "compare.json"
NOT_OF_A_RUN = {"training.seed", "data.path"}
"""Keys that every run of a comparison replaces, or whose content has a fingerprint."""
LEFT_OVER = "move it away, and runs whose folders are there are measured again"


@dataclass(frozen=True)
class Measured:
    """What a finished run gave."""

    variant: str
    seed: int
    loss: float
    """Held-out, nats per token."""
    loss_memory_emptied: float | None
    parameters: int
    state_numbers: int
    """Numbers that a stream carries over all layers."""
    tokens_per_second: float
    """Median over the steps after the first tenth."""
    peak_memory: float
    """Bytes: of the GPU's allocator, or of the whole process on a CPU."""
    machine: str
    """Where it was measured, when its training had ended."""

    @property
    def key(self) -> tuple[str, int]:
        """Variant and seed."""
        return self.variant, self.seed


Record = dict[tuple[str, int], Measured]
"""Runs by variant and seed."""


def data_fingerprint(run: RunConfig) -> str | None:
    """What tells the training text from another; None where it is not there."""
    if not (Path(run.data.path) / MANIFEST_FILE).exists():
        return None
    return TokenDataset(Path(run.data.path), "train").fingerprint


def read_record(run: RunConfig, fingerprint: str | None) -> Record:
    """What compare.json holds; nothing where there is none.

    Args:
        fingerprint: `data_fingerprint` of the run.

    Raises:
        UserError: it is of other settings or of other data, or no record.
    """
    report = _report(Path(run.run_dir) / RESULT_FILE)
    if report is None:
        return {}
    path = Path(run.run_dir) / RESULT_FILE
    try:
        changed = difference(report["config"], run, NOT_OF_A_RUN)
        if changed is None and None not in (fingerprint, report["dataset"]) and fingerprint != report["dataset"]:
            changed = f"data.path {run.data.path} holds other documents"
        record = {each.key: each for each in map(_measured, report["runs"])}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is no record of this version's `evaluate compare`; {LEFT_OVER}") from None
    if changed is not None:
        raise UserError(f"{path} belongs to other settings ({changed}); set it back, or choose another run_dir")
    return record


def _measured(row: dict[str, Any]) -> Measured:
    """A run of the record, where null stands for what was not finite; but a run without memory has no loss without it."""
    finite = {key: value for key, value in row.items() if value is not None or key == "loss_memory_emptied"}
    return Measured(**{**dict.fromkeys(row, math.nan), **finite})


def add_to_record(run: RunConfig, fingerprint: str | None, measured: Measured) -> Record:
    """What compare.json holds with one more run, and what other processes have added meanwhile."""
    path = Path(run.run_dir) / RESULT_FILE
    with locked(path.parent):
        record = {**read_record(run, fingerprint), measured.key: measured}
        report = {
            "steps": run.training.steps,
            "tokens_per_step": run.tokens_per_step,
            "dataset": fingerprint or (_report(path) or {}).get("dataset"),
            "config": asdict(run),
            "runs": [asdict(each) for each in record.values()],
        }
        write_json(path, report, COPIED_RUN_DIR)
    return record


def _report(path: Path) -> dict[str, Any] | None:
    notes: list[str] = []
    report = read_json(path, "evaluate compare", notes)
    if notes:
        raise UserError(f"{path} is not readable; {LEFT_OVER}")
    return report


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that several processes write records to: one at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
