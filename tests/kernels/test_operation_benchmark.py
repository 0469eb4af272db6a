"""Measurements of one layer for `make bench-gpu`, under Triton's interpreter: only checks that the code runs."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import operation, tiles
from infini_kernels import infini_attention, local_attention


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_every_variant_is_measured(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "median_milliseconds", lambda step, on_gpu: float(step() is not None))
    geometry = operation.Geometry("tiny", heads=2, groups=1, width=16, segment=8)
    row = operation.measure_one(geometry, 24, rule, torch.device("cpu"), bandwidth=1e9, plain_at=(24,))
    columns = ("local ms", "memory ms", "whole ms", "learned writes, softmax ms", "states ms", "memory/local", "plain/whole")
    assert [row[name] for name in columns] == [1.0] * len(columns)
    assert math.isclose(row["floor ms"], 1000 * sum(operation.bytes_moved(geometry, 24, 4)) / 1e9)


def test_memory_path_equals_infini_attention_without_local_attention() -> None:
    geometry = operation.Geometry("tiny", heads=2, groups=1, width=16, segment=8)
    q, k, v, gate = operation.inputs(geometry, 24, torch.device("cpu"), torch.float32)
    rotary = operation.rotary_tables(geometry, torch.device("cpu"))
    local = local_attention(q, k, v, segment_length=8, rotary=rotary)
    found = operation.memory_path(q, k, v, gate, local, geometry, "delta")
    wanted = infini_attention(q, k, v, gate, segment_length=8, update_rule="delta", rotary=rotary, backend="reference")[0]
    torch.testing.assert_close(found, wanted)


def test_other_tiles_run_and_write_the_same_outputs() -> None:
    geometry = operation.Geometry("tiny", heads=2, groups=1, width=16, segment=150)
    launches = tiles.recorded(geometry, 300, "delta", device="cpu")
    assert set(tiles.CHOICES) - {"_read_backward_states_kernel"} <= {now.kernel.__name__ for now in launches}
    # Inputs are not copied, because the time depends on their values. Only two kernels have outputs per program.
    for now in launches:
        for trial in tiles.others(now):
            pairs = zip(now.kernel.arg_names, now.arguments, trial.arguments, strict=False)
            grown = {name for name, before, after in pairs if before is not after}
            by_program = {
                "_read_backward_kernel": {"dshare_ptr", "dstate_ptr", "dz_ptr"},
                "_removal_backward_kernel": {"dz_ptr"},
            }
            assert grown <= by_program.get(now.kernel.__name__, set())
    read = next(now for now in launches if now.kernel.__name__ == "_read_kernel")
    out = read.arguments[read.kernel.arg_names.index("out_ptr")]
    wanted = out.clone()
    tried = [trial for trial in tiles.others(read) if trial.settings["num_warps"] == 4 and trial.settings["num_stages"] == 2]
    assert {trial.settings["BW"] for trial in tried} == {32, 64, 128}
    for trial in tried:
        out.fill_(float("nan"))
        trial.start()
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
