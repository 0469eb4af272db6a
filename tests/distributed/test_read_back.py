"""Read-back cosines and learned write strengths are equal in every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.distributed.cases import Case

JOB = ("tests.support.distributed.jobs", "read_back")


@pytest.mark.parametrize(
    "case",
    [Case(tp=2, rule="delta"), Case(pp=2, rule="delta"), Case(dp=2, zero=3, rule="delta")],
    ids=lambda case: case.name,
)
def test_every_layout_measures_the_same(case, pool, run_config):
    learned = replace(
        run_config, model=replace(run_config.model, write_strength="learned", normaliser="corrected", feature_map="softmax")
    )
    expected = pool(1).run(*JOB, case.reference().apply(learned))[0]
    strength = expected["write_strength"]
    assert len(expected["ages"]) > 1 and len(strength) == learned.model.num_layers
    assert all(abs(mean - 1) > 1e-5 for mean in strength), "three training steps have changed the write strength"
    for found in pool(case.processes).run(*JOB, case.apply(learned)):
        assert found["ages"] == expected["ages"]
        for name in ("own_key", "other_key", "write_strength"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)
