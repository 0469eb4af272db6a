"""Tolerant readers of the files that a run recorded.

The file of a killed run can end in an incomplete line, and a resumed run repeats steps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infini_train.runtime.errors import UserError

LARGE_PERPLEXITY = 1e9
"""Perplexities from this value on are printed in scientific notation. They come from runs that diverged."""
LAST_STEPS = 10
"""Number of last records averaged for the loss at the end of training, in the report and in the terminal."""


def perplexity(loss: float) -> float:
    """Return exp(loss). Losses above 700 nats are clipped to 700, because exp would overflow."""
    return math.exp(min(loss, 700.0))


def shown_perplexity(loss: float, decimals: int) -> str:
    """Format the perplexity of a loss with this many decimals, or in scientific notation if it is very large."""
    value = perplexity(loss)
    return f"{value:.{decimals}f}" if value < LARGE_PERPLEXITY else f"{value:.3g}"


@dataclass(frozen=True)
class Records:
    """The lines of metrics.jsonl, one per step in ascending order, and notes on problems in the file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> np.ndarray:
        """Step numbers [S]."""
        return np.array([row["step"] for row in self.rows], dtype=float)

    @property
    def has_gates(self) -> bool:
        """Whether the run recorded gates, which mix memory and local attention."""
        return any(row.get("gates") for row in self.rows)

    @property
    def has_memory(self) -> bool:
        """Whether the attention of the run carries a state from segment to segment."""
        return self.has_gates or len(self.finite("held_out_loss_memory_emptied")) > 0

    @property
    def record_unit(self) -> str:
        """Name of the recorded unit in the plural: "steps", or "logged steps" if logging.every skips steps."""
        return "steps" if len(self.rows) < 2 or np.median(np.diff(self.steps)) <= 1 else "logged steps"

    def column(self, name: str) -> np.ndarray:
        """Return one number per step [S], NaN where the step did not record it."""
        return np.array([_number(row.get(name)) for row in self.rows], dtype=float)

    def finite(self, name: str) -> np.ndarray:
        """Return the finite values of a column."""
        values = self.column(name)
        return values[np.isfinite(values)]

    def last(self, name: str) -> float | None:
        """Return the newest finite value of a column, or None."""
        values = self.finite(name)
        return float(values[-1]) if len(values) else None

    def nested(self, name: str, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return values per layer (rank 1) or per layer and head (rank 2).

        Returns:
            The steps [S] that recorded them and the values [S, layers] or [S, layers, heads]; None if no step recorded them.
            Steps with a value that is not finite, or with a shape other than that of the newest step, are left out.
        """
        found: list[tuple[int, np.ndarray]] = []
        for row in self.rows:
            if not row.get(name):
                continue
            try:
                values = np.array(row[name], dtype=float)
            except (TypeError, ValueError):
                continue
            if values.ndim == rank and values.size and np.isfinite(values).all():
                found.append((row["step"], values))
        if not found:
            return None
        shape = found[-1][1].shape
        kept = [(step, values) for step, values in found if values.shape == shape]
        return np.array([step for step, _ in kept], dtype=float), np.stack([values for _, values in kept])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def read_metrics(path: Path) -> Records:
    """Read metrics.jsonl.

    A step number that goes back means that the run was resumed from a checkpoint. Earlier records from that step on belong to
    discarded weights, so the later lines replace them.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist, so there is nothing to report; run `infini-train pretrain` first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable, or name another --run_dir") from error
    by_step: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    replaced = 0
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            unreadable.append(number)
            continue
        if by_step and row["step"] <= next(reversed(by_step)):
            abandoned = [step for step in by_step if step >= row["step"]]
            replaced += len(abandoned)
            for step in abandoned:
                del by_step[step]
        by_step[row["step"]] = row
    records = Records(list(by_step.values()), _notes_on_lines(lines, unreadable, replaced))
    losses = records.column("loss")
    if bad := int(np.sum(~np.isfinite(losses))):
        records.notes.append(f"The training loss is missing or not finite at {_plural(bad, 'step', 'steps')}.")
    return records


def _notes_on_lines(lines: list[tuple[int, str]], unreadable: list[int], replaced: int) -> list[str]:
    notes = []
    if unreadable and unreadable[-1] == lines[-1][0]:
        notes.append(
            f"The last line of metrics.jsonl (line {unreadable[-1]}) is incomplete and was left out: "
            "the run was killed while it wrote the line, or is still running."
        )
        unreadable = unreadable[:-1]
    if unreadable:
        numbers = ", ".join(str(number) for number in unreadable[:5]) + (", …" if len(unreadable) > 5 else "")
        notes.append(
            f"{_plural(len(unreadable), 'line', 'lines')} of metrics.jsonl could not be read and "
            f"{'was' if len(unreadable) == 1 else 'were'} left out (line {numbers})."
        )
    if replaced:
        notes.append(
            f"{_plural(replaced, 'step was', 'steps were')} recorded and then repeated from a checkpoint; "
            "only the latest record of each step is shown."
        )
    return notes


def read_json(path: Path, command: str, notes: list[str]) -> dict[str, Any] | None:
    """Read an optional JSON object.

    Args:
        command: command that writes the file, named in the note.
        notes: gets a note if the file is damaged.

    Returns:
        The object, or None if the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name} is not readable JSON and was left out; write it again with `{command}`.")
    return None


@dataclass(frozen=True)
class HeldOut:
    """The latest held-out losses in nats per token, with memory and with the memory emptied."""

    loss: float | None = None
    loss_memory_emptied: float | None = None
    unigram_entropy: float | None = None
    source: str = ""
    step: int | None = None
    same_data: bool | None = True
    """Whether data.path is the data of the training, so that the held-out text was not trained on. None if unknown."""

    @property
    def text_description(self) -> str:
        """Description of the measured text, as the beginning of a sentence."""
        if self.same_data is None:
            return "On held-out text"
        if not self.same_data:
            return "On held-out text of other data than its own, which may include text from its training"
        return "On text that it was not trained on"


def held_out(records: Records, evaluation: dict[str, Any] | None) -> HeldOut:
    """Return the losses in evaluation.json, or of the last evaluation during training if that file is missing."""
    if evaluation is not None:
        step, same_data = evaluation.get("step"), evaluation.get("same_data")
        return HeldOut(
            loss=_finite((evaluation.get("with_memory") or {}).get("loss")),
            loss_memory_emptied=_finite((evaluation.get("memory_emptied") or {}).get("loss")),
            unigram_entropy=_finite(evaluation.get("unigram_entropy")),
            source=(f"evaluation of step {step:,}" if isinstance(step, int) else "evaluation.json")
            + (", on other data than it was trained on" if same_data is False else ""),
            step=step if isinstance(step, int) else None,
            same_data=same_data,
        )
    for row in reversed(records.rows):
        if (loss := _finite(row.get("held_out_loss"))) is not None:
            emptied = _finite(row.get("held_out_loss_memory_emptied"))
            return HeldOut(loss, emptied, None, f"evaluation during training, step {row['step']:,}", row["step"])
    return HeldOut()


def _finite(value: Any) -> float | None:
    number = _number(value)
    return number if np.isfinite(number) else None


def positions(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the valid entries of by_position, ordered by segment."""
    entries = (evaluation or {}).get("by_position") or []
    usable = [entry for entry in entries if isinstance(entry.get("first_segment"), int)]
    return sorted(
        (entry for entry in usable if _finite(entry.get("loss")) is not None), key=lambda entry: entry["first_segment"]
    )
