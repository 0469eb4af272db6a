"""Write each step's metrics as one JSON object to a file, and to Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from infini_train.config import RunConfig
from infini_train.runtime.errors import UserError, one_line
from infini_train.runtime.files import without_nan

FINISH_SECONDS = 60.0
"""Longest wait at the end of a run for uploads to Weights & Biases: a job must end before its time limit."""


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop records after a checkpoint's step, which the resumed run writes again, and invalid lines left by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    replacement = path.with_suffix(".jsonl.new")
    replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)


def _wandb_id(run_dir: Path) -> str:
    """Return the run's id at Weights & Biases from its file; create a new id if the file is missing or damaged by a crash."""
    path = run_dir / "wandb_id"
    saved_id = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"[\w.-]+", saved_id):
        saved_id = uuid.uuid4().hex[:12]
        path.write_text(saved_id, encoding="utf-8")
    return saved_id


def _for_wandb(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten a record for Weights & Biases: one number per layer for lists, and one histogram per layer for gates."""
    import wandb

    flat: dict[str, Any] = {}
    for key, value in record.items():
        if not isinstance(value, list):
            flat[key] = value
            continue
        for layer, of_layer in enumerate(value, start=1):
            if isinstance(of_layer, list):  # a histogram refuses numbers that are not finite
                of_layer = wandb.Histogram([number for number in of_layer if isfinite(number)], num_bins=20)
            flat[f"{key}/layer_{layer}"] = of_layer
    return flat


def _wandb_mode(run: RunConfig) -> Literal["online", "offline", "off"]:
    if run.logging.wandb != "auto":
        return run.logging.wandb
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked == "disabled":
        return "off"
    return "online" if asked == "online" or os.environ.get("WANDB_API_KEY") else "off"


def _open_wandb(run: RunConfig, mode: Literal["online", "offline"]) -> Any:
    import wandb

    opened = wandb.init(
        project=run.logging.wandb_project,
        name=Path(run.run_dir).name,
        dir=run.run_dir,
        mode=mode,
        config=asdict(run),
        # A run directory stays one run at Weights & Biases when it is stopped and started again.
        id=_wandb_id(Path(run.run_dir)),
        resume="allow",
        settings=wandb.Settings(silent=True, finish_timeout=FINISH_SECONDS),
    )
    opened.define_metric("*", step_metric="step")
    return opened


class MetricsWriter:
    """Appends records to `metrics.jsonl` of the run directory and to Weights & Biases, on the main process only."""

    def __init__(self, run: RunConfig, first_step: int, enabled: bool) -> None:
        self._file: FileIO | None = None
        self._unwritten = b""
        """Records that could not be written yet."""
        self._wandb: Any = None
        if not enabled:
            return
        self._path = Path(run.run_dir) / "metrics.jsonl"
        try:
            truncate_metrics(self._path, first_step)
            self._file = self._path.open("ab", buffering=0)  # a buffer would write again what it could not write
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror or error}; make room, or name another run_dir"
            ) from error
        mode = _wandb_mode(run)
        if mode != "off":
            # Imported here because it takes a second, and many runs do not use it.
            import wandb

            try:
                self._wandb = _open_wandb(run, mode)
            except wandb.errors.Error as error:  # no network or a wrong key must not stop training
                reason = str(error).splitlines()[0]
                print(
                    f"Weights & Biases cannot be reached ({reason}); records go to {run.run_dir}/wandb, and `wandb sync` sends "
                    "them later",
                    file=sys.stderr,
                )
                # The service process of wandb keeps the run that it could not open.
                wandb.teardown()
                self._wandb = _open_wandb(run, "offline")

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record immediately, so that a killed run loses none. On a full disk, retry with the next record."""
        if self._file is not None:
            had_room = not self._unwritten
            self._unwritten += (json.dumps(without_nan(record), allow_nan=False) + "\n").encode()
            error = self._append()
            if error is not None and had_room:
                print(f"\n{self._path} cannot be written: {error.strerror}; training goes on, and tries again", file=sys.stderr)
        # Do not pass `step` to wandb: its step must never decrease, but ours does after a rollback.
        self._with_wandb(lambda opened: opened.log(_for_wandb(record)))

    def _with_wandb(self, use: Callable[[Any], None]) -> None:
        """Call a function with the Weights & Biases run; stop using it after a failure, such as the death of its process."""
        if self._wandb is None:
            return
        try:
            use(self._wandb)
        except Exception as error:  # its connection can raise any exception
            import wandb

            self._wandb = None
            with suppress(Exception):  # without teardown it raises again when Python exits
                wandb.teardown()
            print(
                f"\nWeights & Biases is lost ({one_line(error)}); training goes on, and {self._path} has every record",
                file=sys.stderr,
            )

    def _append(self) -> OSError | None:
        """Write as many pending bytes as possible; return the error if some remain."""
        assert self._file is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            return error
        return None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._with_wandb(lambda opened: opened.finish())
        if self._file is not None:
            error = self._append()
            self._file.close()
            if error is not None and kind is None:
                raise UserError(f"{self._path} cannot be written: {error.strerror}; the newest records are lost") from error
