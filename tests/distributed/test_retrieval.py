"""`evaluate passkey`: answers equal those of streaming generation, whatever the micro-batches and the layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.config import LayoutConfig, RunConfig, TaskConfig, save_config
from infini_train.data.preparation import prepare
from tests.support.corpus import small_run
from tests.support.distributed.command import call

JOBS = "tests.support.distributed.retrieval_jobs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with initial weights so large that an untrained model predicts different tokens at different positions."""
    folder = tmp_path_factory.mktemp("retrieval")
    run = small_run(folder)
    task = TaskConfig(
        kind="passkey", samples=24, held_out_samples=4, min_tokens=140, max_tokens=200, rows=4, samples_per_cell=6
    )
    run = replace(
        run,
        data=replace(run.data, vocab_size=384),
        task=task,
        model=replace(run.model, init_std=0.4),
        training=replace(run.training, segments_per_micro_batch=3),
    )
    prepare(run)
    return run


@pytest.mark.parametrize("kind,keys", [("passkey", 1), ("associative_recall", 2)])
def test_answers_equal_streaming_generation(kind, keys, run, pool):
    """The lengths put answers inside a micro-batch of 48 positions, at its border, and across it."""
    run = replace(run, task=replace(run.task, kind=kind, keys=keys))
    result = pool(1).run(JOBS, "answers", run, [191, 192, 193, 194, 196, 198, 200, 240])[0]
    assert result["ours"] == result["expected"]
    predicted = [tuple(greedy) for _, greedy in result["ours"]]
    assert len(set(predicted)) > 8, "the model should predict different answers"
    assert any(forced != greedy for forced, greedy in result["ours"]), "the two decodings should differ for some answer"


def test_tensor_parallel_ranks_predict_the_same_answers(run, pool):
    one = pool(1).run(JOBS, "answers", run, [193])[0]
    two = pool(2).run(JOBS, "answers", replace(run, layout=LayoutConfig(tensor_parallel_size=2)), [193])
    assert [result["ours"] for result in two] == [one["ours"]] * 2


@pytest.mark.parametrize("processes,tp", [(1, 1), (2, 1), (2, 2)])
def test_accuracies_match_their_definitions(processes, tp, run, pool):
    """Two of six texts have a wrong second digit: 28 of 30 tokens are correct under teacher forcing, 22 of 30 greedily.

    Exact match is 4 of 6.
    """
    layout = LayoutConfig(tensor_parallel_size=tp)
    for cell in pool(processes).run(JOBS, "cell_with_known_errors", replace(run, layout=layout), 193, 2):
        assert cell["token_accuracy"] == pytest.approx(28 / 30)
        assert cell["greedy_token_accuracy"] == pytest.approx(22 / 30)
        assert cell["exact_match"] == pytest.approx(4 / 6)


def test_the_command_writes_cells_a_table_and_a_heat_map(run, tmp_path):
    task = replace(run.task, lengths=[300, 150], depths=[0.0, 1.0])
    training = replace(run.training, steps=3, precision="bfloat16")
    run = replace(run, run_dir=str(tmp_path / "run"), task=task, training=training)
    save_config(run, tmp_path / "run.yaml")
    config = ["--config", str(tmp_path / "run.yaml")]
    call("pretrain", *config)
    output = call("evaluate", "passkey", *config)
    result = json.loads((tmp_path / "run" / "passkey.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(150, 0.0), (150, 1.0), (300, 0.0), (300, 1.0)]
    assert all(cell["samples"] == 6 and cell["seed"] == 0 and 0 <= cell["exact_match"] <= 1 for cell in result["cells"])
    assert result["complete"] is True and result["step"] == 3 and result["task"]["kind"] == "passkey"
    assert "exact match under greedy decoding" in output and "300" in output
    whole = (tmp_path / "run" / "passkey.json").read_text()
    kept = [{**cell, "exact_match": 0.125} for cell in result["cells"][:3]]  # a value that no measurement gives
    stopped = {**result, "cells": kept, "complete": False}
    (tmp_path / "run" / "passkey.json").write_text(json.dumps(stopped))
    output = call("evaluate", "passkey", *config)
    assert "resuming after 3 of 4 cells" in output and "300 tokens, depth 1" in output and "300 tokens, depth 0" not in output
    again = json.loads((tmp_path / "run" / "passkey.json").read_text())
    assert again == {**result, "cells": [*kept, result["cells"][3]]}
    call("evaluate", "passkey", *config)
    assert (tmp_path / "run" / "passkey.json").read_text() == whole, "a complete measurement is repeated from the start"
    call("report", *config)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Retrieval</h2>" in page and "Exact match on the retrieval task" in page and "6 texts a cell" in page

    weights, alone = tmp_path / "weights.safetensors", tmp_path / "alone"
    call("checkpoint", "consolidate", "--run_dir", str(tmp_path / "run"), "--output", str(weights))
    alone.mkdir()
    shutil.copy(Path(run.data.path) / "tokenizer.model", alone)
    from_file = ["--from_checkpoint", str(weights), "--data.path", str(alone), "--run_dir", str(tmp_path / "again")]
    call("evaluate", "passkey", *config, *from_file)
    again = json.loads((tmp_path / "again" / "passkey.json").read_text())
    assert again["cells"] == result["cells"] and again["step"] == 3
    refused = call("evaluate", "passkey", *config, *from_file, "--model.init_std", "0.3", expected=2)
    assert "model.init_std is 0.3, but checkpoint" in refused and "was trained with 0.4" in refused
