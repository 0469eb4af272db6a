"""A stopped run resumes with bitwise equal results. Processes are really killed and started again."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.checkpoint.folder import list_checkpoints
from infini_train.checkpoint.reader import describe_tensors
from infini_train.config import CheckpointConfig, LayoutConfig, RunConfig, save_config
from infini_train.config.validation import ATTENTION
from infini_train.planning.disk_space import checkpoint_bytes
from tests.support.distributed.assemble import global_memory, global_weights
from tests.support.distributed.cases import Case
from tests.support.warm.interpreter import launcher
from tests.unit.checkpoint.test_folder import recommit

REPOSITORY = Path(__file__).parents[2]
TIMED = {
    "step_seconds",
    "tokens_per_second",
    "peak_memory",
    "checkpoint_step",
    "checkpoint_pause_seconds",
    "checkpoint_durable_seconds",
}


def start(
    run: RunConfig, processes: int, command: Callable[[Path], list[str]] = launcher, terminal: int | None = None
) -> subprocess.Popen[str]:
    """Start `pretrain` through the launcher, as a user does; in a terminal of its own, if one is given."""
    path = Path(run.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    config = path.with_suffix(".yaml")
    save_config(run, config)
    return subprocess.Popen(
        [*command(REPOSITORY / "launch" / "local.py"), str(processes), "pretrain", "--config", str(config)],
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=terminal is not None,
        preexec_fn=None if terminal is None else lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0),
    )


def finish(process: subprocess.Popen[str], expected: int) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


def metrics(run: RunConfig) -> list[dict[str, Any]]:
    """Read the records without wall-clock values."""
    lines = (Path(run.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def wait_for_step(run: RunConfig, step: int, process: subprocess.Popen[str]) -> None:
    path = Path(run.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text(encoding="utf-8").count("\n") >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.fixture(scope="module")
def run(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two pipeline stages, evaluation on, and more steps than a test waits for."""
    return replace(
        run_config,
        run_dir=str(tmp_path_factory.mktemp("runs") / "undisturbed"),
        layout=LayoutConfig(pipeline_parallel_size=2, zero_stage=1),
        training=replace(run_config.training, steps=24),
        evaluation=replace(run_config.evaluation, every=8),
        checkpoint=CheckpointConfig(every=5),
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig) -> list[dict[str, Any]]:
    finish(start(run, 2), 0)
    return metrics(run)


def elsewhere(run: RunConfig, name: str) -> RunConfig:
    return replace(run, run_dir=str(Path(run.run_dir).with_name(name)))


def test_same_seed_gives_bitwise_equal_metrics(run, undisturbed):
    again = elsewhere(run, "again")
    finish(start(again, 2), 0)
    assert metrics(again) == undisturbed
    assert [record["step"] for record in undisturbed] == list(range(1, 25))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_resumes(number, run, undisturbed):
    stopped = elsewhere(run, f"stopped-{number.name}")
    process = start(stopped, 2)
    wait_for_step(stopped, 3, process)
    process.send_signal(number)
    output = finish(process, 85)
    assert "the same command goes on from there" in output
    assert "Traceback" not in output
    steps = len(metrics(stopped))
    assert steps < 24
    output = finish(start(stopped, 2), 0)
    assert f"step_{steps:08d}" in output
    assert metrics(stopped) == undisturbed


def test_closed_terminal_saves_and_the_run_resumes(run, undisturbed):
    """Output of the launcher and its ranks after the terminal closes is dropped."""
    closed = elsewhere(run, "closed")
    screen, terminal = os.openpty()
    process = start(closed, 2, terminal=terminal)
    os.close(terminal)
    path = Path(closed.run_dir) / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= 3):
        assert select.select([screen], [], [], 120)[0]
        os.read(screen, 1 << 16)
    os.close(screen)
    assert process.wait(timeout=240) == 85
    steps = len(metrics(closed))
    assert steps < 24
    assert f"step_{steps:08d}" in finish(start(closed, 2), 0)
    assert metrics(closed) == undisturbed


def test_killed_rank_ends_the_run_which_resumes_from_the_last_checkpoint(run, undisturbed):
    killed = elsewhere(run, "killed")
    process = start(killed, 2)
    wait_for_step(killed, 7, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    finish(process, 128 + signal.SIGKILL)
    assert sorted(path.name for path in (Path(killed.run_dir) / "checkpoints").glob("step_*[0-9]"))[0] == "step_00000005"
    finish(start(killed, 2), 0)
    assert metrics(killed) == undisturbed


def test_only_the_newest_checkpoints_are_kept(run, undisturbed):
    names = sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir())
    assert names == ["step_00000020", "step_00000024"]


def test_checkpoint_has_the_planned_size(run, undisturbed):
    newest = list_checkpoints(Path(run.run_dir))[-1]
    tensors = describe_tensors(newest)
    streams = [tensors.pop(name) for name in ("streams", "random.torch")]
    assert sum(each.properties.dtype.itemsize * each.size.numel() for each in streams) < 10_000
    held = sum(each.properties.dtype.itemsize * each.size.numel() for each in tensors.values())
    assert held == checkpoint_bytes(run)
    files = sum(path.stat().st_size for path in newest.glob("*.distcp"))
    assert held < files < held + 2500 * (len(tensors) + 1) + 10_000  # each tensor has a torch.save header


def test_restarting_a_finished_run_changes_nothing(run, undisturbed):
    assert "trained to step 24" in finish(start(run, 2), 0)
    assert metrics(run) == undisturbed


def test_checkpoint_of_other_data_or_order_is_refused(run, undisturbed):
    """A saved position would be valid in another order or set of documents too, but would denote other text."""
    other = elsewhere(run, "other streams")
    shutil.copytree(run.run_dir, other.run_dir)
    reordered = replace(other, training=replace(run.training, seed=run.training.seed + 1, steps=25))
    assert f"training.seed is {run.training.seed + 1}, but checkpoint" in finish(start(reordered, 2), 2)
    newest = list_checkpoints(Path(other.run_dir))[-1]
    facts = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**facts, "dataset_fingerprint": "0" * 64}))
    recommit(newest)
    longer = replace(other, training=replace(run.training, steps=25))
    assert f"data.path {run.data.path} holds other documents" in finish(start(longer, 2), 2)


@pytest.mark.parametrize(
    "saved,loaded",
    [
        (Case(pp=2), Case()),
        (Case(tp=2), Case(pp=2, zero=0)),
        (Case(dp=2, zero=2), Case(tp=2)),
        (Case(dp=2, zero=3), Case(dp=2)),
        (Case(pp=2, virtual=2), Case(cp=2, tp=2)),
        (Case(pp=4, zero=0), Case(pp=2, virtual=2, dp=2)),
    ],
    ids=lambda case: case.name,
)
def test_state_loads_in_another_layout(saved, loaded, pool, run_config, tmp_path):
    """A checkpoint does not depend on its layout: weights, moments, memory and positions are all restored."""
    run = replace(run_config, run_dir=str(tmp_path / "run"))
    before = pool(saved.processes).run("tests.support.distributed.jobs", "save_after", saved.apply(run), 3, 2)
    after = pool(loaded.processes).run("tests.support.distributed.jobs", "load_and_train", loaded.apply(run), 2)
    assert after[0]["loss"] == pytest.approx(before[0]["loss"], rel=1e-5)
    assert after[0]["grad_norm"] == pytest.approx(before[0]["grad_norm"], rel=1e-5)
    expected, weights = global_weights(before), global_weights(after)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", [each for each in ATTENTION if each != "infini"])
def test_every_attention_resumes_exactly(attention, pool, run_config, tmp_path):
    model = replace(run_config.model, attention=attention)
    run = Case().apply(replace(run_config, run_dir=str(tmp_path / "run"), model=model))
    before = pool(1).run("tests.support.distributed.jobs", "save_after", run, 3, 2)
    after = pool(1).run("tests.support.distributed.jobs", "load_and_train", run, 2)
    assert after[0]["loss"] == before[0]["loss"]
    expected, weights = global_weights(before), global_weights(after)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


CHAIN = [
    Case(),
    Case(tp=2, zero=0),
    Case(pp=2, virtual=2, dp=2, zero=2, recompute="stage"),
    Case(cp=2),
    Case(dp=2, zero=3),
    Case(dp=2, tp=2, sequence_parallel=True),
    Case(pp=2),
]


@pytest.mark.parametrize(
    "chain,options",
    [(CHAIN, {}), ([CHAIN[0], CHAIN[1], CHAIN[3], CHAIN[5]], {"short_convolution": 3, "short_convolution_reach": "document"})],
    ids=["paper", "convolution across borders"],
)
def test_resharding_keeps_the_state_and_reads_each_token_once(chain, options, pool, run_config, tmp_path):
    """A run that changes its layout several times keeps its state bit by bit, and reads the tokens of an undisturbed run."""

    def leg(case: Case, folder: str, steps: int) -> list[dict[str, Any]]:
        model = replace(run_config.model, **options)
        run = replace(case.apply(replace(run_config, model=model)), run_dir=str(tmp_path / folder))
        return pool(case.processes).run("tests.support.distributed.jobs", "resume_train_save", run, steps)

    reads, losses = [], []
    before: list[dict[str, Any]] | None = None
    for case in chain:
        results = leg(case, "chain", 2)
        loaded = [result["loaded"] for result in results]
        if before is not None:
            for kind in ("model", "exp_avg", "exp_avg_sq"):
                ours, theirs = global_weights(loaded, kind), global_weights(before, kind)
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    assert torch.equal(ours[name], value), f"{kind} of {name} changed on the way to {case.name}"
            ours, theirs = global_memory(loaded), global_memory(before)
            assert ours.keys() == theirs.keys()
            for layer, states in theirs.items():
                assert all(torch.equal(mine, other) for mine, other in zip(ours[layer], states, strict=True)), layer
        before = [result["saved"] for result in results]
        reads += [each for result in results for each in result["reads"]]
        losses += results[0]["loss"]
    undisturbed = leg(Case(), "undisturbed", 2 * len(chain))[0]
    assert losses == pytest.approx(undisturbed["loss"], rel=1e-5)
    assert sorted(reads) == sorted(undisturbed["reads"])
    assert len(set(reads)) == len(reads), "the test reads less than one epoch, so no read may repeat"
