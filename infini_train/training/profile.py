"""`--profile.steps N`: write a trace of N steps for a trace viewer, and a table of their time by part of the step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from infini_train.config import RunConfig
from infini_train.parallel.layout import Layout
from infini_train.runtime import platform
from infini_train.training.step_times import PartTime, time_by_part

WARMUP_STEPS = 3
"""Steps before the measured ones: the first steps allocate GPU memory and compile kernels."""


class StepProfiler:
    """Profiles steps 4 to N + 3 after the start, on one rank of each pipeline stage; does nothing on other ranks.

    Args:
        say: called with each line of the result.
    """

    def __init__(self, run: RunConfig, layout: Layout, say: Callable[[str], None]) -> None:
        self._steps, self._seen, self._seconds = run.profiling.steps, 0, 0.0
        self._folder = Path(run.run_dir) / "profile"
        self._stage, self._say = layout.pp_rank, say
        one_of_stage = layout.dp_rank == 0 and layout.tp_rank == 0 and layout.cp_rank == 0
        self._profiler: profile | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence its start and stop messages
        if self._steps and one_of_stage:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if platform.has_cuda() else [])]
            self._profiler = profile(activities=kinds)

    def after_step(self, record: dict[str, Any], *, last: bool) -> None:
        """Count a finished step; start or end the measurement when its step is reached.

        Args:
            record: the step's metrics.
            last: the run was asked to stop, so the steps measured so far are written now.
        """
        if self._profiler is None:
            return
        self._seen += 1
        if self._seen == WARMUP_STEPS and not last:
            self._profiler.start()
        elif self._seen > WARMUP_STEPS:
            self._seconds += record["step_seconds"]
            if last or self._seen == WARMUP_STEPS + self._steps:
                self.close(record["step"])

    def close(self, last_step: int) -> None:
        """End the measurement and write the results, if this rank profiles."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        measured = self._seen - WARMUP_STEPS
        if measured >= 0:  # the profiler was started
            if platform.has_cuda():
                torch.cuda.synchronize()
            profiler.stop()
        if measured < 1:
            self._say(
                f"no profile was written: there were {self._seen} steps since this start, and the first {WARMUP_STEPS} are not "
                "measured; raise training.steps"
            )
            return
        parts = time_by_part(profiler.events(), measured, platform.has_cuda())
        step = 1000 * self._seconds / measured
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"stage_{self._stage}.trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        found = {
            "first_step": last_step - measured + 1,
            "last_step": last_step,
            "device": torch.cuda.get_device_name() if platform.has_cuda() else "cpu",
            "step_ms": step,
            "parts": [asdict(part) for part in parts],
        }
        (self._folder / f"stage_{self._stage}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for line in profile_table(parts, step, platform.has_cuda()):
            self._say(line)
        self._say(f"profile of steps {found['first_step']} to {last_step}: {trace} (open it at https://ui.perfetto.dev)")


def profile_table(parts: list[PartTime], step: float, on_gpu: bool) -> list[str]:
    """Format the time of each part of a step as a table.

    Args:
        parts: time of each part.
        step: wall-clock time of a step in milliseconds.
        on_gpu: the times are those of GPU kernels.

    Returns:
        The lines of the table.
    """
    lines = [f"{'part of a step':<32}{'forward':>10}{'backward':>10}{'ms':>10}{'share':>8}"]
    for part in parts:
        if part.total:
            lines.append(
                f"{part.name:<32}{part.forward:>10.2f}{part.backward:>10.2f}{part.total:>10.2f}{part.total / step:>8.1%}"
            )
    left = step - sum(part.total for part in parts)
    name = "GPU waits" if on_gpu else "Python, and waiting"
    return [*lines, f"{name:<32}{'':>10}{'':>10}{left:>10.2f}{left / step:>8.1%}", f"{'step':<52}{step:>10.2f}"]
