"""Dry run of one rank of a job with 64 GPUs: parameters, shapes, messages and memory agree with the plan."""

from __future__ import annotations

import pytest

from tests.support.distributed.command import REPOSITORY, call

LAYOUT = "--layout.tensor_parallel_size={} --layout.context_parallel_size={} --layout.pipeline_parallel_size={}"
SHORT = "--training.micro_batches_per_window=2 --training.windows_per_step=2"


@pytest.mark.parametrize(
    "config,rank,options",
    [
        ("8b", 5, "--training.micro_batches_per_window=4"),
        ("8b", 37, f"{LAYOUT.format(2, 2, 4)} {SHORT} --training.recompute_layers=3"),
        ("8b", 37, f"{LAYOUT.format(2, 2, 4)} {SHORT} --training.segments_per_micro_batch=2"),
        (
            "8b",
            63,
            f"{LAYOUT.format(4, 1, 4)} {SHORT} --layout.virtual_stages=2 --training.recompute=stage --training.rows=16 "
            "--model.update_rule=linear",
        ),
        (
            "8b",
            0,
            f"{LAYOUT.format(8, 1, 8)} {SHORT} --layout.sequence_parallel=false --training.recompute=none --training.rows=4",
        ),
        ("8b-1m", 40, SHORT),
    ],
    ids=["8b", "some-layers", "tp2-cp2-pp4", "last-of-chunks", "no-recompute", "8b-1m"],
)
def test_dry_run_agrees_with_the_plan(config, rank, options):
    job = ["plan", "--config", str(REPOSITORY / "configs" / f"{config}.yaml"), "--gpus", "64", "--gpu", "h100-80gb"]
    printed = call(*job, *options.split(), "--dry_run", "--rank", str(rank))
    assert f"dry run of rank {rank} of 64" in printed
    assert "differs" not in printed
    assert "shapes and messages are equal, memory parts within 2%, peak within 10%" in printed
