"""Table of the report that divides the time of a training step by operation, from the files that `--profile.steps` writes."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from infini_train.report.page import table
from infini_train.report.run_results import read_json


def time_sections(run_dir: Path, notes: list[str]) -> str:
    """Return a section with a table for each profiled pipeline stage, or an empty string if there is no profile."""
    files = sorted((run_dir / "profile").glob("stage_*.json"), key=lambda file: int(file.stem.removeprefix("stage_")))
    stages = [read_json(file, "infini-train pretrain --profile.steps 3", notes) for file in files]
    tables = [_stage(number, stage, len(files)) for number, stage in enumerate(stages) if stage is not None]
    if not tables:
        return ""
    intro = (
        "Milliseconds of one training step by operation, forward and backward. On a GPU this is the time of the kernels of an "
        "operation. The folder profile/ contains the traces."
    )
    return f'<section><h2>Time of a training step</h2><p class="intro">{intro}</p>{"".join(tables)}</section>'


def _stage(number: int, stage: dict[str, Any], stages: int) -> str:
    step = stage["step_ms"]
    rows = [
        (
            operation["name"],
            *(f"{operation[key]:,.2f}" for key in ("forward", "backward")),
            *_total(operation["forward"] + operation["backward"], step),
        )
        for operation in stage["parts"]
        if operation["forward"] + operation["backward"]
    ]
    rest = step - sum(operation["forward"] + operation["backward"] for operation in stage["parts"])
    rows.append(("waiting" if stage["device"] != "cpu" else "Python, and waiting", "", "", *_total(rest, step)))
    steps = f"mean of steps {stage['first_step']:,} to {stage['last_step']:,}"
    where = f"Pipeline stage {number}, " if stages > 1 else ""
    caption = f"{where}{steps}, {step:,.1f} ms each, on {stage['device']}"
    caption = caption[0].upper() + caption[1:]
    head = ("operation", "forward (ms)", "backward (ms)", "total (ms)", "share")
    return f'{table(head, rows)}<p class="intro">{html.escape(caption)}.</p>'


def _total(milliseconds: float, step: float) -> tuple[str, str]:
    return f"{milliseconds:,.2f}", f"{milliseconds / step:.1%}"
