"""The gradient of the memory between micro-batches: every layout reports the norms that plain torch computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train.attention import detached
from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import StreamReader
from infini_train.reference.plain_model import token_losses
from tests.support.distributed.assemble import global_weights
from tests.support.distributed.cases import Case

JOB = ("tests.support.distributed.jobs", "memory_gradient_norms")


def expected_norms(run, initial):
    """Compute the norms in plain torch, with one graph per window that retains the gradients of the memory inside it."""
    weights = {name: value.clone().requires_grad_() for name, value in initial.items()}
    training = run.training
    dataset = TokenDataset(Path(run.data.path), "train")
    reader = StreamReader(dataset, range(training.rows), training.rows, run.model.segment_length, training.seed)
    windows = [
        [reader.next(training.segments_per_micro_batch) for _ in range(training.micro_batches_per_window)]
        for _ in range(training.windows_per_step)
    ]
    weight = sum(batch.loss_weight for window in windows for batch in window)
    memory, between = {}, []
    for window in windows:
        memory = {layer: detached(state) for layer, state in memory.items()}
        loss = torch.zeros(())
        for index, batch in enumerate(window):
            if index:
                between.append(dict(memory))
                for state in memory.values():
                    state.M.retain_grad()
                    state.z.retain_grad()
            loss = loss + (token_losses(run, weights, batch, memory) * batch.loss_mask).sum() / weight
        loss.backward()
    return [
        sum(float(field.grad.double().square().sum()) for state in between for field in (state[layer].M, state[layer].z)) ** 0.5
        for layer in range(run.model.num_layers)
    ]


@pytest.mark.parametrize("width", [0, 3], ids=["no convolution", "convolution across borders"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_one_process_equals_autograd_in_plain_torch(rule, width, pool, run_config):
    run = Case(rule=rule).apply(run_config)
    reach = "document" if width else "segment"
    run = replace(run, model=replace(run.model, short_convolution=width, short_convolution_reach=reach))
    (found,) = pool(1).run(*JOB, run)
    expected = expected_norms(run, global_weights([found], "initial"))
    assert min(expected) > 0 and found["norms"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "case",
    [Case(pp=2, virtual=2, recompute="stage"), Case(tp=2, sequence_parallel=True), Case(dp=2, zero=3)],
    ids=lambda case: case.name,
)
def test_every_layout_reports_the_same(case, pool, run_config):
    expected = pool(1).run(*JOB, case.reference().apply(run_config))[0]["norms"]
    for found in pool(case.processes).run(*JOB, case.apply(run_config)):
        assert found["norms"] == pytest.approx(expected, rel=1e-4)


def test_no_norm_is_reported_if_a_window_is_one_micro_batch(pool, run_config):
    assert pool(1).run(*JOB, Case(window=(4, 1)).apply(run_config))[0]["norms"] is None
