"""Missing and damaged shards, at the start of a run and during it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.config import CheckpointConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.preparation import prepare
from tests.distributed.test_checkpoint import finish, start, wait_for_step
from tests.distributed.test_failures import pretrain
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.cases import Case


@pytest.fixture
def run(tmp_path):
    """A run of two data-parallel ranks on a corpus of several shards, with more steps than a test waits for."""
    write_corpus(tmp_path / "text")
    run = small_run(tmp_path)
    run = replace(
        run,
        data=replace(run.data, shard_size_mb=0.03),
        training=replace(run.training, steps=100_000, self_test=False),
        checkpoint=CheckpointConfig(every=100_000),
    )
    prepare(run)
    return Case(dp=2, window=(1, 4)).apply(run)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_changed_shard_is_fatal_by_default_and_named_once(run):
    shard = TokenDataset(Path(run.data.path), "train")._files[1]
    flip_a_bit(shard)
    output = finish(start(run, 2), 2)
    first, *rest = output.splitlines()
    assert first == "launch: starting 2 processes" and len(rest) == 1, output
    assert f"{shard} has another checksum" in output and "set data.on_bad_shard to skip" in output


def test_bad_shards_are_named_counted_and_skipped(run):
    dataset = TokenDataset(Path(run.data.path), "train")
    flip_a_bit(dataset._files[0])
    dataset._files[2].unlink()
    lost = int(((dataset._shard == 0) | (dataset._shard == 2)).sum())
    run = replace(run, data=replace(run.data, on_bad_shard="skip"), training=replace(run.training, steps=3))
    output = finish(start(run, 2), 0)
    assert f"left out: {dataset._files[0]} has another checksum" in output
    assert f"left out: {dataset._files[2]} is missing" in output
    assert (
        f"2 of {len(dataset._files)} training shards are left out, with {lost} of {dataset.num_documents} documents" in output
    )
    lines = (Path(run.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["documents_left_out"] for line in lines] == [lost] * 3


def test_shard_damaged_during_the_run_is_fatal_and_named(run):
    run = replace(run, data=replace(run.data, on_bad_shard="skip"))
    process = start(run, 2)
    wait_for_step(run, 2, process)
    for shard in TokenDataset(Path(run.data.path), "train")._files:
        with shard.open("r+b") as file:
            file.write(b"\xff" * shard.stat().st_size)
    output = finish(process, 2)
    errors = [line for line in output.splitlines() if "error" in line]
    assert len(errors) == 1 and ".tar is damaged in document" in errors[0], output
    assert "Traceback" not in output


def test_data_replaced_during_the_run_is_an_error(run):
    run = replace(run, training=replace(run.training, steps=4), evaluation=replace(run.evaluation, every=2))
    result = pretrain(run, 2, "replace_data_in_evaluation@0@2")
    assert result.returncode == 2, result.stdout
    assert f"data.path {run.data.path} was replaced or moved away while it was read" in result.stdout
    assert "Traceback" not in result.stdout


def test_read_error_on_one_rank_stops_all_ranks_with_its_message(run, pool):
    """Otherwise the others would wait for it; and only rank 0 prints to the user."""
    first, second = pool(2).run("tests.support.distributed.health_jobs", "damage_next_document", run, 1)
    assert first == second and ".tar is damaged in document" in first
