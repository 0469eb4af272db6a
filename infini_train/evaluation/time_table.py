"""The report's table of where the time of a training step goes, from what `--profile.steps` wrote."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from infini_train.evaluation.page import table
from infini_train.evaluation.records import read_json


def time_sections(run_dir: Path, notes: list[str]) -> str:
    """A section with a table for each pipeline stage that was profiled; nothing if none was."""
    files = sorted((run_dir / "profile").glob("stage_*.json"), key=lambda file: int(file.stem.removeprefix("stage_")))
    stages = [read_json(file, "infini-train pretrain --profile.steps 3", notes) for file in files]
    tables = [_stage(number, stage, len(files)) for number, stage in enumerate(stages) if stage is not None]
    if not tables:
        return ""
    intro = (
        "Milliseconds of one training step, counted by part; the backward of an operation belongs to its part. On a GPU this "
        "is the time of its kernels. profile/ holds the traces."
    )
    return f'<section><h2>Where the time of a step goes</h2><p class="intro">{intro}</p>{"".join(tables)}</section>'


def _stage(number: int, stage: dict[str, Any], stages: int) -> str:
    step = stage["step_ms"]
    rows = [
        (
            part["name"],
            *(f"{part[key]:,.2f}" for key in ("forward", "backward")),
            *_total(part["forward"] + part["backward"], step),
        )
        for part in stage["parts"]
        if part["forward"] + part["backward"]
    ]
    rest = step - sum(part["forward"] + part["backward"] for part in stage["parts"])
    rows.append(("waiting" if stage["device"] != "cpu" else "Python, and waiting", "", "", *_total(rest, step)))
    steps = f"mean of steps {stage['first_step']:,} to {stage['last_step']:,}"
    where = f"Stage {number} of the pipeline, " if stages > 1 else ""
    caption = f"{where}{steps}, {step:,.1f} ms each, on {stage['device']}"
    caption = caption[0].upper() + caption[1:]
    return f'{table(("part", "forward", "backward", "ms", "share"), rows)}<p class="intro">{html.escape(caption)}.</p>'


def _total(milliseconds: float, step: float) -> tuple[str, str]:
    return f"{milliseconds:,.2f}", f"{milliseconds / step:.1%}"
