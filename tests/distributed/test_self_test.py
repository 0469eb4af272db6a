"""The self-test passes in correct layouts; otherwise it stops the run and names the value that differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.cli.configuration import read_config
from tests.support.distributed.cases import Case

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
def test_correct_layouts_pass(case, pool, run_config):
    assert (
        pool(case.processes).run("tests.support.distributed.jobs", "run_self_test", case.apply(run_config))
        == [None] * case.processes
    )


@pytest.mark.parametrize(
    "case", [Case(dp=2), Case(tp=2, cp=2, rule="delta"), Case(pp=2, virtual=2)], ids=lambda case: case.name
)
def test_correct_layouts_pass_in_bfloat16(case, pool, run_config):
    run = case.apply(replace(run_config, training=replace(run_config.training, precision="bfloat16")))
    assert pool(case.processes).run("tests.support.distributed.jobs", "run_self_test", run) == [None] * case.processes


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_every_shipped_configuration_passes_on_two_processes(config, pool):
    """Each configuration as shipped, except for parallelism that needs more than two processes."""
    run = read_config(config)
    if config.stem == "8b-1m":
        run = replace(run, layout=replace(run.layout, context_parallel_size=2, pipeline_parallel_size=1))
    assert pool(2).run("tests.support.distributed.jobs", "run_self_test", run) == [None, None]


@pytest.mark.parametrize("attention", ["local", "full"])
def test_other_kinds_of_attention_pass(attention, pool, run_config):
    run = Case(pp=2).apply(replace(run_config, model=replace(run_config.model, attention=attention)))
    assert pool(2).run("tests.support.distributed.jobs", "run_self_test", run) == [None, None]


@pytest.mark.parametrize(
    "fault,words",
    [("drop_norm_gradients", "grad_norm of step"), ("skip_a_weight", "parameter decoder.layers.1.mlp.linear_fc2.weight")],
)
def test_faulty_layout_is_reported(fault, words, pool, run_config):
    """Faults: gradients of sequence-parallel norms are not summed; one stage does not update a weight."""
    case = Case(tp=2, sequence_parallel=True, window=(1, 4)) if fault == "drop_norm_gradients" else Case(pp=2, window=(1, 4))
    for message in pool(2).run("tests.support.distributed.jobs", "run_self_test", case.apply(run_config), fault):
        assert message is not None
        assert words in message and "self-test" in message


def test_fault_in_bfloat16_alone_is_reported(pool, run_config):
    run = Case(pp=2, window=(1, 4)).apply(replace(run_config, training=replace(run_config.training, precision="bfloat16")))
    for message in pool(2).run("tests.support.distributed.jobs", "run_self_test", run, "skip_a_weight_in_bfloat16"):
        assert message is not None
        assert "in bfloat16, parameter decoder.layers.1.mlp.linear_fc2.weight" in message
