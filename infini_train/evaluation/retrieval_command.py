"""The command `infini-train evaluate passkey`: measure a grid of lengths and depths, print a table, write RUN/passkey.json."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infini_train.config import RunConfig
from infini_train.data.task_samples import make_filler
from infini_train.evaluation.commands import load_model
from infini_train.measurement.retrieval import Cell, measure_cell
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.report.run_results import read_json
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import write_json
from infini_train.tasks import Task
from infini_train.tokenizers.tokenizer_file import tokenizer_of

RESULT_FILE = "passkey.json"
FORWARD_TOKENS = {"cpu": 8_192, "cuda": 65_536}
"""Tokens over all rows of a process in one forward pass, if the attention allows it. On a CPU, larger passes exceed the caches:
100,000 tokens of width 128 run at half the speed."""


def evaluation_run(run: RunConfig, world_size: int) -> RunConfig:
    """Return the run with a micro-batch size for inference. The number of segments per micro-batch does not change results.

    Raises:
        UserError: the layout would split a text over processes, or task.rows does not fit the data-parallel size.
    """
    layout = run.layout
    if world_size > 1 and (layout.pipeline_parallel_size > 1 or layout.context_parallel_size > 1):
        raise UserError(
            f"layout.pipeline_parallel_size is {layout.pipeline_parallel_size} and layout.context_parallel_size is "
            f"{layout.context_parallel_size}; evaluate passkey does not split a text over processes; start it as one process"
        )
    dp = run.data_parallel_size(world_size)
    rows = min(run.task.rows, -(-run.task.samples_per_cell // dp) * dp)
    if rows % dp:
        raise UserError(f"task.rows is {rows}, which is not divisible by the data-parallel size {dp}; change one of the two")
    segments = run.training.segments_per_micro_batch
    # The context of full attention is the micro-batch, so its size must stay that of training.
    if run.model.attention != "full":
        segments = max(1, FORWARD_TOKENS[platform.device().type] // (rows // dp * run.model.segment_length))
    training = replace(run.training, segments_per_micro_batch=segments)
    return replace(run, training=training, task=replace(run.task, rows=rows))


def evaluate_passkey(run: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Measure every cell, shortest texts first.

    The results are written after each cell. The same command resumes a stopped measurement.

    Returns:
        The contents of passkey.json.

    Raises:
        UserError: the result file could not be written after the last cell. Raised at the end, after the table is printed.
    """
    target = Path(run.run_dir) / RESULT_FILE
    # Read the file before load_model, which synchronises all processes: no process has written a cell yet.
    before = read_json(target, "evaluate passkey", [])
    loaded = load_model(run, checkpoint)
    layout = loaded.layout
    tokenizer = tokenizer_of(run.data.path)
    task = Task(run.task, tokenizer, make_filler(run, tokenizer, held_out=True))
    pipeline = SegmentPipeline(loaded.engine, run, layout, len(layout.rows(run.task.rows)))
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "task": {**asdict(run.task), "kind": task.kind},
        "filler_period": task.filler.period,
        "cells": [],
        "complete": False,
    }
    if before is not None and before == {**report, "cells": before.get("cells")}:
        report["cells"] = before["cells"]
    cells = [(length, depth) for length in sorted(run.task.lengths) for depth in run.task.depths]
    batches = -(-run.task.samples_per_cell // run.task.rows)
    left = sum(length - 1 for length, _ in cells[len(report["cells"]) :]) * batches
    if report["cells"] and layout.is_main:
        print(f"resuming after {len(report['cells'])} of {len(cells)} cells found in {target}", file=sys.stderr)
    write_error: UserError | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (layout.is_main and console.is_terminal)) as progress:
        line = progress.add_task(task.kind, total=left)
        for length, depth in cells[len(report["cells"]) :]:
            name = f"{task.kind}, {length:,} tokens, depth {depth:g}"
            progress.update(line, description=name)
            cell = measure_cell(run, layout, pipeline, task, length, depth, lambda count: progress.advance(line, count))
            report["cells"].append(asdict(cell))
            report["complete"] = len(report["cells"]) == len(cells)
            if layout.is_main:
                write_error = _try_write(target, report)
                if not console.is_terminal:
                    done = progress.tasks[line]
                    minutes = (done.elapsed or 0.0) / 60 * (left / done.completed - 1)
                    print(f"{name}: {cell.exact_match:.1%} exact, {minutes:.1f} min left", file=sys.stderr, flush=True)
    if layout.is_main:
        print(*table(report), sep="\n")
        if write_error is not None:
            raise write_error
        print(f"all cells: {target}", file=sys.stderr)
    return report


def _try_write(target: Path, report: dict[str, Any]) -> UserError | None:
    """Write the file and return the error if that fails. The measurement continues, and its results are printed at the end."""
    try:
        write_json(target, report)
    except UserError as error:
        return error
    return None


def table(report: dict[str, Any]) -> list[str]:
    """Return the lines of a table of exact match and token accuracy in per cent, with lengths as rows and depths as columns."""
    cells = [Cell(**cell) for cell in report["cells"]]
    depths = sorted({cell.depth for cell in cells})
    by_place = {(cell.length, cell.depth): cell for cell in cells}
    lines = [
        f"checkpoint {report['checkpoint']}, {report['task']['kind']}, {cells[0].samples} texts a cell",
        "exact match under greedy decoding / token accuracy under teacher forcing, in per cent, by depth of the fact",
        f"{'tokens':>12}" + "".join(f"{depth:>14g}" for depth in depths),
    ]
    for length in sorted({cell.length for cell in cells}):
        row = [by_place[length, depth] for depth in depths if (length, depth) in by_place]
        lines.append(
            f"{length:>12,}" + "".join(f"{100 * cell.exact_match:>8.0f} /{100 * cell.token_accuracy:>4.0f}" for cell in row)
        )
    return lines
