"""All commands in sequence on a small corpus, as in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infini_train.config import save_config
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.command import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a configuration file with two pipeline stages and learned writes."""
    folder = tmp_path_factory.mktemp("commands")
    write_corpus(folder / "text")
    run = small_run(folder)
    run.layout.pipeline_parallel_size = 2
    run.model.write_strength = "learned"
    run.evaluation.every = 4
    run.logging.wandb = "offline"
    save_config(run, folder / "run.yaml")
    return folder


def test_prepare_train_evaluate_generate_report(folder):
    config = ["--config", str(folder / "run.yaml")]
    assert "60 documents" in call("prepare", *config)
    output = call("pretrain", *config, "--profile.steps", "3", processes=2)
    assert "trained to step 8" in output
    assert "attention: PyTorch" in output and "profile of steps 4 to 6" in output

    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["tokens"] == sum(round(2048 / 4 * (1 - record["padding"])) for record in records)
    assert {"loss", "grad_norm", "lr", "gate_lr", "padding", "tokens_per_second", "gates", "memory_norm"} <= set(records[0])
    assert "held_out_loss_memory_emptied" in records[3] and "held_out_loss" not in records[4]
    assert len(records[3]["memory_write_strength"]) == 4 and "memory_write_strength" not in records[4]
    assert len(records[0]["gates"]) == 4 and len(records[0]["gates"][0]) == 4
    for stage, own in ((0, "data"), (1, "output layer and loss")):
        profiled = json.loads((folder / "run" / "profile" / f"stage_{stage}.json").read_text())
        shares = {each["name"]: (each["forward"] + each["backward"]) / profiled["step_ms"] for each in profiled["parts"]}
        assert min(shares[name] for name in ("local attention", "memory path", "linear layers", "communication", own)) > 0
        assert sum(shares.values()) < 1.2
    assert list((folder / "run" / "wandb").glob("offline-run-*/*.wandb")), "Weights & Biases wrote nothing"

    output = call("evaluate", *config)
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert f"{evaluation['unigram_entropy']:.4f}" in output
    assert all(f"{mean:.3f}" in output.split("strength of a write")[1] for mean in evaluation["read_back"]["write_strength"])
    assert sum(row["tokens"] for row in evaluation["by_position"]) == evaluation["tokens"]
    first = evaluation["by_position"][0]
    assert first["loss"] == pytest.approx(first["loss_memory_emptied"]), "the first segment has no memory to empty"
    shuffled = evaluation["memory_shuffled"]
    assert 0.5 * evaluation["tokens"] < shuffled["tokens"] < evaluation["tokens"] and "shuffled" in output
    own = evaluation["with_memory_where_shuffled"]
    assert own["tokens"] == shuffled["tokens"] and own["loss"] != evaluation["with_memory"]["loss"]
    row = next(line for line in output.splitlines() if "all, where shuffled" in line)
    assert row.split()[-3:] == [f"{own['perplexity']:.3f}", "-", f"{shuffled['perplexity']:.3f}"]
    later = evaluation["by_position"][1]
    assert later["loss_memory_shuffled"] != later["loss"]

    # Two processes in the layout of the run measure the same loss as one process.
    one = evaluation["with_memory"]["loss"]
    call("evaluate", *config, processes=2)
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert evaluation["with_memory"]["loss"] == pytest.approx(one, rel=1e-6)

    assert "continuation ---" in call("generate", *config, "--prompt", "once upon ▁ a time", "--max_new_tokens", "20")
    again = call("generate", *config, "--prompt", "once upon ▁ a time", "--max_new_tokens", "20")
    assert again == call("generate", *config, "--prompt", "once upon ▁ a time", "--max_new_tokens", "20")
    output = call("report", *config)
    assert "nats per token in the first logged step" in output
    report = Path(re.search(r"report: (.*)", output)[1])
    assert report.is_file() and "<svg" in report.read_text(encoding="utf-8")
    assert report.read_text(encoding="utf-8").count("<td>memory path</td>") == 2
    assert "Learned strength of a write" in report.read_text(encoding="utf-8")


def test_user_errors_are_one_line_through_the_launcher(folder):
    config = ["--config", str(folder / "run.yaml")]
    call("prepare", *config, "--overwrite")
    for arguments, words in (
        (["--layout.pipeline_parallel_size", "3"], "layout.pipeline_parallel_size"),
        (["--training.rows", "41000"], "training.rows"),
        (["--data.vocab_size", "256"], "data.vocab_size"),
        (["--data.path", str(folder / "nowhere")], "infini-train prepare"),
    ):
        output = call("pretrain", *config, *arguments, processes=2, expected=2)
        # Some errors are found by the ranks, after the launcher has printed its first line.
        lines = [line for line in output.splitlines() if line != "launch: starting 2 processes"]
        assert len(lines) == 1 and words in lines[0], output


def test_a_tokenizer_that_does_not_match_the_shards_is_refused(folder):
    config = ["--config", str(folder / "run.yaml")]
    other = folder / "other"
    call("prepare", *config, "--overwrite")
    write_corpus(folder / "other text", seed=1)
    call("prepare", *config, "--data.path", str(other), "--data.source", str(folder / "other text"))
    (folder / "data" / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    output = call("pretrain", *config, processes=2, expected=2)
    assert len(output.splitlines()) == 1 and "tokenizer" in output


def test_a_checkpoint_with_another_model_configuration_is_refused(folder):
    config = ["--config", str(folder / "run.yaml")]
    call("prepare", *config, "--overwrite")
    run_dir = ["--run_dir", str(folder / "mismatch"), "--logging.wandb", "off", "--evaluation.every", "0"]
    call("pretrain", *config, *run_dir, "--training.steps", "3", processes=2)
    output = call("pretrain", *config, *run_dir, "--model.num_layers", "2", processes=2, expected=2)
    assert "model.num_layers is 2" in output
