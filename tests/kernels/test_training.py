"""Training steps with the kernels, with every recompute setting, compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infini_train.cli.configuration import read_config
from infini_train.config import RunConfig
from infini_train.data.preparation import prepare
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.processes import Ranks
from tests.support.warm.interpreter import warm_python

ROOT = Path(__file__).parents[2]
CONFIGS = ["1b", "8b", "8b-1m", "paper"]
WAYS = [("none", 0), ("layer", 0), ("layer", 1), ("stage", 0)]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with warm_python():
        yield


@pytest.mark.parametrize("options", [{}, {"update_rule": "delta", "write_strength": "learned"}], ids=["linear", "delta"])
def test_steps_are_the_same_with_every_recompute_setting(options: dict[str, Any], tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=20)
    run = small_run(tmp_path)
    run.model = replace(run.model, num_layers=2, head_dim=16, **options)
    run.training = replace(run.training, rows=2, micro_batches_per_window=2, windows_per_step=1)
    prepare(run)
    (found,) = Ranks(1).run("tests.support.kernel_training_jobs", "steps", run, WAYS, 1)
    plain = found.pop("plain")
    assert len(found) == len(WAYS)
    first = found.pop("none 0")
    for records in zip(first, plain, strict=True):
        assert records[0] == pytest.approx(records[1], rel=1e-4)
    for way, records in found.items():
        assert records == first, way


def small_twin(run: RunConfig, folder: Path) -> RunConfig:
    """Return a run with the options of `run` and its kind of layout (at most two processes per dimension), and the smallest
    model."""
    small, layout, training = small_run(folder), run.layout, run.training
    tp, cp, pp = (
        min(size, 2) for size in (layout.tensor_parallel_size, layout.context_parallel_size, layout.pipeline_parallel_size)
    )
    sizes = {"num_layers": 2 * pp * layout.virtual_stages, "hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
    sizes |= {"head_dim": 16, "ffn_hidden_size": 80, "segment_length": 16}
    return replace(
        small,
        model=replace(run.model, **sizes),
        layout=replace(layout, tensor_parallel_size=tp, context_parallel_size=cp, pipeline_parallel_size=pp),
        training=replace(
            training,
            rows=2,
            segments_per_micro_batch=2,
            micro_batches_per_window=2,
            windows_per_step=1,
            recompute_layers=min(training.recompute_layers, 1),
        ),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_gpu_configurations_train_with_the_kernels(name: str, tmp_path: Path) -> None:
    """In bfloat16, in processes of its own layout; losses are those of plain PyTorch within rounding."""
    shipped = read_config(ROOT / "configs" / f"{name}.yaml")
    assert shipped.training.precision == "bfloat16"
    write_corpus(tmp_path / "text", documents=20)
    run = small_twin(shipped, tmp_path)
    prepare(run)
    way = (run.training.recompute, run.training.recompute_layers)
    for found in Ranks(run.layout.model_processes).run("tests.support.kernel_training_jobs", "steps", run, [way], 1):
        for kernels, plain in zip(found[f"{way[0]} {way[1]}"], found["plain"], strict=True):
            assert kernels == pytest.approx(plain, rel=2e-2)


# tests/gpu has all of them.
@pytest.mark.parametrize(("name", "precision"), [("1b", "bfloat16"), ("8b", "float32"), ("paper", "bfloat16")])
def test_self_test_passes_with_the_kernels(name: str, precision: str, tmp_path: Path) -> None:
    """It runs before every training run on several GPUs."""
    run = small_twin(read_config(ROOT / "configs" / f"{name}.yaml"), tmp_path)
    found = Ranks(run.layout.model_processes).run("tests.support.kernel_training_jobs", "found_by_self_test", run, precision)
    assert found == [None] * run.layout.model_processes
