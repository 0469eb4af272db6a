"""The record compare.json: results of the finished runs of a comparison. It remains valid when their folders are deleted."""

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
from infini_train.report.run_results import read_json
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import COPIED_RUN_DIR, write_json

RESULT_FILE = "compare.json"
IGNORED_KEYS = {"training.seed", "data.path"}
"""Keys that may differ from the record: each run sets its own seed, and a fingerprint identifies the data."""
REMEDY = "move it away; runs whose folders still exist are then measured again"


@dataclass(frozen=True)
class Measured:
    """Results of a finished run."""

    variant: str
    seed: int
    loss: float
    """Held-out loss in nats per token."""
    loss_memory_emptied: float | None
    """Held-out loss with the memory emptied at every segment; None if the variant carries no state."""
    parameters: int
    state_numbers: int
    """Number of values that one stream carries from segment to segment, summed over all layers."""
    tokens_per_second: float
    """Training throughput: median over the steps after the first tenth."""
    peak_memory: float
    """Peak in bytes of the GPU allocator, or of the whole process on a CPU."""
    machine: str
    """Hardware and torch version of the process that recorded the results after training."""

    @property
    def key(self) -> tuple[str, int]:
        """Variant and seed."""
        return self.variant, self.seed


Record = dict[tuple[str, int], Measured]
"""Results by variant and seed."""


def data_fingerprint(run: RunConfig) -> str | None:
    """Return the fingerprint of the training split, or None if data.path holds no data."""
    if not (Path(run.data.path) / MANIFEST_FILE).exists():
        return None
    return TokenDataset(Path(run.data.path), "train").fingerprint


def read_record(run: RunConfig, fingerprint: str | None) -> Record:
    """Read compare.json. Return an empty record if the file does not exist.

    Args:
        run: the comparison.
        fingerprint: `data_fingerprint` of the run.

    Raises:
        UserError: the record has other settings or other data, or the file is not a valid record.
    """
    report = _report(Path(run.run_dir) / RESULT_FILE)
    if report is None:
        return {}
    path = Path(run.run_dir) / RESULT_FILE
    try:
        changed = difference(report["config"], run, IGNORED_KEYS)
        if changed is None and None not in (fingerprint, report["dataset"]) and fingerprint != report["dataset"]:
            changed = f"data.path {run.data.path} holds other documents"
        record = {each.key: each for each in map(_measured, report["runs"])}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path} is not a record of this version of `evaluate compare`; {REMEDY}") from None
    if changed is not None:
        raise UserError(f"{path} belongs to other settings ({changed}); set it back, or choose another run_dir")
    return record


def _measured(row: dict[str, Any]) -> Measured:
    """Convert a row of the record. null means NaN, except for loss_memory_emptied, where it means that there is no memory."""
    finite = {key: value for key, value in row.items() if value is not None or key == "loss_memory_emptied"}
    return Measured(**{**dict.fromkeys(row, math.nan), **finite})


def add_to_record(run: RunConfig, fingerprint: str | None, measured: Measured) -> Record:
    """Add a run to compare.json under a lock, and return the record with all runs that other processes have added."""
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
        raise UserError(f"{path} is not readable; {REMEDY}")
    return report


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder in which several processes write records."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
