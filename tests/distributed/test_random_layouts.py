"""Random runs in a random layout, resumed in another one, against one process and plain torch.

Set INFINI_TRAIN_RANDOM_CASES, for example to 200, to test more cases than the default of 4.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infini_train.data.dataset import TokenDataset
from infini_train.reference.plain_model import train_plainly
from tests.distributed.test_layouts import RELATIVE, assert_same_run
from tests.support.distributed.assemble import global_weights
from tests.support.distributed.random_cases import random_case

CASES = int(os.environ.get("INFINI_TRAIN_RANDOM_CASES", "4"))


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_run_is_the_same_in_random_layouts(seed, pool, run_config, tmp_path):
    case = random_case(replace(run_config, run_dir=str(tmp_path)), seed)
    one = pool(1).run("tests.support.distributed.jobs", "train", case.one, 4)
    plain = train_plainly(case.one, TokenDataset(Path(case.one.data.path), "train"), global_weights(one, "initial"), 4)
    for name in ("loss", "grad_norm"):
        assert one[0][name] == pytest.approx(plain[name], rel=RELATIVE)
    for name, value in global_weights(one).items():
        torch.testing.assert_close(value, plain["weights"][name], rtol=RELATIVE, atol=1e-6)

    begun, ended = (
        pool(processes).run("tests.support.distributed.jobs", "train", run, 2, True)
        for run, processes in (case.first, case.second)
    )
    for result in ended:
        for name in ("loss", "grad_norm"):
            result[name] = begun[0][name] + result[name]
    assert_same_run(ended, one)
