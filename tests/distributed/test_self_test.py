"""The self-test passes where a layout is exact, and stops a run where it is not, with the name of what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.parser import read_config
from tests.distributed.cases import Case

CONFIGS = Path(__file__).parents[2] / "configs"

CASES = [
    Case(tp=2, sequence_parallel=True, window=(1, 4)),
    Case(pp=2, window=(1, 4), recompute="stage"),
    Case(pp=2, virtual=2, window=(1, 4)),
    Case(cp=2, rule="delta"),
    Case(dp=2, zero=3, window=(1, 4)),
    Case(tp=2, pp=2, zero=0, window=(1, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_layouts_pass(case, pool, run_config):
    assert (
        pool(case.processes).run("tests.distributed.jobs", "run_self_test", case.apply(run_config)) == [None] * case.processes
    )


@pytest.mark.parametrize(
    "case", [Case(dp=2), Case(tp=2, cp=2, rule="delta"), Case(pp=2, virtual=2)], ids=lambda case: case.name
)
def test_exact_layouts_pass_in_bfloat16(case, pool, run_config):
    run = case.apply(replace(run_config, training=replace(run_config.training, precision="bfloat16")))
    assert pool(case.processes).run("tests.distributed.jobs", "run_self_test", run) == [None] * case.processes


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_every_shipped_configuration_passes_on_two_processes(config, pool):
    """As its file says that it is trained, but for parallelism that two processes are too few for."""
    run = read_config(config)
    if config.stem == "8b-1m":
        run = replace(run, layout=replace(run.layout, context_parallel_size=2, pipeline_parallel_size=1))
    assert pool(2).run("tests.distributed.jobs", "run_self_test", run) == [None, None]


@pytest.mark.parametrize("attention", ["local", "full"])
def test_the_rivals_pass(attention, pool, run_config):
    run = Case(pp=2).apply(replace(run_config, model=replace(run_config.model, attention=attention)))
    assert pool(2).run("tests.distributed.jobs", "run_self_test", run) == [None, None]


@pytest.mark.parametrize(
    "fault,words",
    [("drop_norm_gradients", "grad_norm of step"), ("skip_a_weight", "parameter decoder.layers.1.mlp.linear_fc2.weight")],
)
def test_a_wrong_layout_is_named(fault, words, pool, run_config):
    """Sequence-parallel norms whose gradients are not summed; a weight that one stage forgets to update."""
    case = Case(tp=2, sequence_parallel=True, window=(1, 4)) if fault == "drop_norm_gradients" else Case(pp=2, window=(1, 4))
    for message in pool(2).run("tests.distributed.jobs", "run_self_test", case.apply(run_config), fault):
        assert message is not None
        assert words in message and "self-test" in message


def test_what_is_wrong_in_bfloat16_alone_is_named(pool, run_config):
    run = Case(pp=2, window=(1, 4)).apply(replace(run_config, training=replace(run_config.training, precision="bfloat16")))
    for message in pool(2).run("tests.distributed.jobs", "run_self_test", run, "skip_a_weight_in_bfloat16"):
        assert message is not None
        assert "in bfloat16, parameter decoder.layers.1.mlp.linear_fc2.weight" in message
