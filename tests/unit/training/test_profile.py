"""Time of a training step by part: assignment of operations, profiler messages and the report."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from infini_kernels import infini_attention
from infini_kernels.timing import timed, timed_as
from infini_train.cli.parser import expand_aliases
from infini_train.config import ProfilingConfig, RunConfig
from infini_train.config.validation import validate
from infini_train.report.run_report import write_report
from infini_train.runtime.errors import UserError
from infini_train.training.profile import StepProfiler
from infini_train.training.step_times import OTHER, STEP, time_by_part
from tests.unit.report.test_report import step_record, write_run


class Cube(torch.autograd.Function):
    """An autograd function in Python; operations in its forward create no graph nodes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x * x * 3


def events_of(work) -> list[FunctionEvent]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
        work()
    return list(profiler.events())


def own_time(events: list[FunctionEvent], *names: str) -> float:
    """Return the milliseconds of the named operations, including the operations they call."""
    return sum(event.cpu_time_total for event in events if event.name in names) / 1000


def parts_of(events: list[FunctionEvent]) -> dict[tuple[str, str], float]:
    found = defaultdict(float)
    for each in time_by_part(events, 1, on_gpu=False):
        found[each.name, "forward"], found[each.name, "backward"] = each.forward, each.backward
    return found


def test_events_outside_a_step_are_not_counted() -> None:
    """For example an evaluation between two steps, or a backward whose forward ran before the step."""
    x = torch.randn(64, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (x @ x).sum().backward()
        with record_function(STEP), timed("memory path"):
            torch.exp(x)
        x @ x
    parts = {each.name: each.total for each in time_by_part(list(profiler.events()), 1, on_gpu=False) if each.total}
    assert parts.keys() == {"memory path"}


def test_operation_and_backward_belong_to_the_innermost_part() -> None:
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

    @timed_as("inner")
    def sine(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def work() -> None:
        hidden = x @ weight
        with timed("outer"):
            hidden = sine(Cube.apply(hidden).tanh()).exp()
        hidden.relu().sum().backward()

    events = events_of(work)
    found = parts_of(events)
    assert found["inner", "forward"] == pytest.approx(own_time(events, "part: inner"), rel=1e-6)
    assert found["inner", "backward"] == pytest.approx(
        own_time(events, "autograd::engine::evaluate_function: SinBackward0"), rel=1e-6
    )
    outer = [
        f"autograd::engine::evaluate_function: {name}Backward{'' if name == 'Cube' else 0}" for name in ("Cube", "Tanh", "Exp")
    ]
    assert found["outer", "backward"] == pytest.approx(own_time(events, *outer), rel=1e-6)
    assert found["linear layers", "forward"] == pytest.approx(own_time(events, "aten::matmul"), rel=1e-6)
    assert (
        0
        < found["linear layers", "backward"]
        <= own_time(events, "autograd::engine::evaluate_function: MmBackward0", "aten::mm")
    )
    assert found["optimizer", "backward"] + found["optimizer", "forward"] > 0  # AccumulateGrad
    assert found[OTHER, "forward"] >= own_time(events, "aten::relu")


def test_every_operation_is_counted_once() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    events = events_of(lambda: Cube.apply(x @ x).relu().sum().backward())
    roots = [event for event in events if event.cpu_parent is not None and event.cpu_parent.name == STEP]
    total = sum(event.cpu_time_total for event in roots) / 1000
    assert sum(parts_of(events).values()) == pytest.approx(total, rel=1e-6)


def test_attention_and_memory_are_separate_parts() -> None:
    q, k, v = (torch.randn(2, 128, 2, 32, requires_grad=True) for _ in range(3))

    def work() -> None:
        out, memory = infini_attention(q, k, v, torch.zeros(2), segment_length=32)
        (out.sum() + memory.M.sum()).backward()

    events = events_of(work)
    found = parts_of(events)
    local = "aten::scaled_dot_product_attention"
    assert own_time(events, local) <= found["local attention", "forward"] < own_time(events, "part: memory path")
    assert found["local attention", "backward"] >= own_time(
        events, "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    )
    assert min(found["memory path", side] for side in ("forward", "backward")) > 0


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_too_few_steps_print_that_no_profile_was_written(steps: int, tmp_path: Path) -> None:
    """Zero steps: the run has already finished all its steps."""
    run = RunConfig(run_dir=str(tmp_path), profiling=ProfilingConfig(steps=2))
    said: list[str] = []
    profiler = StepProfiler(run, SimpleNamespace(pp_rank=0, dp_rank=0, tp_rank=0, cp_rank=0), said.append)
    for step in range(steps):
        profiler.after_step({"step": 8 + step, "step_seconds": 1.0}, last=False)
    profiler.close(7 + steps)
    (line,) = said
    assert f"no profile was written: there were {steps} steps since this start, and the first 3 are not measured" in line
    assert not list(tmp_path.iterdir())


def test_report_shows_the_profile(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [step_record(step) for step in range(1, 9)])
    (run_dir / "profile").mkdir()
    parts = [{"name": "memory path", "forward": 1.0, "backward": 2.0}, {"name": "data", "forward": 0.0, "backward": 0.0}]
    found = {"first_step": 4, "last_step": 6, "device": "cpu", "step_ms": 4.0, "parts": parts}
    (run_dir / "profile" / "stage_0.json").write_text(json.dumps(found), encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<td>memory path</td><td>1.00</td><td>2.00</td><td>3.00</td><td>75.0%</td>" in page
    assert "<td>Python, and waiting</td><td></td><td></td><td>1.00</td><td>25.0%</td>" in page
    assert "Mean of steps 4 to 6, 4.0 ms each, on cpu" in page and "<td>data</td>" not in page
    (run_dir / "profile" / "stage_0.json").write_text("{", encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "stage_0.json is not readable JSON" in page and "Time of a training step" not in page


def test_profile_steps_flag_has_an_alias() -> None:
    """`submit --profile` names a cluster profile, so the config section is called profiling."""
    spelled = expand_aliases(["submit", "--profile", "slurm.yaml", "--profile.steps", "3", "--profile.steps=2"])
    assert spelled == ["submit", "--profile", "slurm.yaml", "--profiling.steps", "3", "--profiling.steps=2"]


def test_negative_steps_are_refused() -> None:
    with pytest.raises(UserError, match=r"profiling\.steps is -1; use 0 to turn profiling off"):
        validate(RunConfig(profiling=ProfilingConfig(steps=-1)), world_size=1)
