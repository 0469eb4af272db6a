"""`evaluate` and `generate` of a trained run whose data, disk or folders have changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infini_train.config import save_config
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.command import call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with run.yaml and a run of three steps."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_corpus(folder / "text")
    save_config(small_run(folder), folder / "run.yaml")
    config = ["--config", str(folder / "run.yaml")]
    call("prepare", *config)
    call("pretrain", *config, "--training.steps", "3")
    return folder


def test_evaluation_warns_if_the_data_was_prepared_again(trained, tmp_path):
    """The same text is split again with another fraction, so held-out documents are among the training documents."""
    config = ["--config", str(trained / "run.yaml"), "--data.path", str(tmp_path / "data")]
    call("prepare", *config)
    assert "warning: data.path" not in call("evaluate", *config)
    assert json.loads((trained / "run" / "evaluation.json").read_text())["same_data"] is True
    tokenizer = ["--data.tokenizer", str(trained / "data" / "tokenizer.model")]
    call("prepare", *config, *tokenizer, "--overwrite", "--data.held_out_fraction", "0.4")
    output = call("evaluate", *config)
    assert "warning: the held-out split of data.path" in output and "tokens, and below 50,000" in output
    warning = next(line for line in output.splitlines() if line.startswith("warning: data.path"))
    assert "holds other training documents" in warning and "--data.path" in warning
    assert json.loads((trained / "run" / "evaluation.json").read_text())["same_data"] is False
    report = call("report", "--run_dir", str(trained / "run")).split("report: ")[1].strip()
    assert "of other data than its own" in Path(report).read_text()
    weights = str(tmp_path / "weights.safetensors")
    call("checkpoint", "consolidate", "--run_dir", str(trained / "run"), "--output", weights)
    assert "warning: data.path" not in call("evaluate", *config, "--from_checkpoint", weights)
    assert json.loads((trained / "run" / "evaluation.json").read_text())["same_data"] is None
    (trained / "run" / "evaluation.json").unlink()


def test_a_result_is_printed_if_its_file_cannot_be_written(trained):
    """A link to /dev/full simulates a full disk."""
    config, run_dir = ["--config", str(trained / "run.yaml")], trained / "run"
    task = ["--task.kind", "passkey", "--task.lengths", "[250,300]", "--task.depths", "[0.5]", "--task.samples_per_cell", "1"]
    for name, command, shown in (
        ("passkey", ["evaluate", "passkey", *config, *task], "         300       "),
        ("evaluation", ["evaluate", *config], "held-out loss"),
        ("generation", ["generate", *config, "--prompt", "a", "--max_new_tokens", "3"], "continuation ---"),
    ):
        full = run_dir / f"{name}.json.new"
        full.symlink_to("/dev/full")
        output = call(*command, expected=2)
        full.unlink()
        assert shown in output and f"{name}.json cannot be written (No space left on device)" in output
        assert not (run_dir / f"{name}.json").exists()


def test_generation_needs_only_the_tokenizer_of_the_data(trained, tmp_path):
    """A user may have a checkpoint and the tokenizer, but not the training set."""
    generate = ["generate", "--config", str(trained / "run.yaml"), "--data.path", str(tmp_path), "--max_new_tokens", "3"]
    shutil.copy(trained / "data" / "tokenizer.model", tmp_path)
    assert "continuation ---" in call(*generate, "--prompt", "a")
    assert "or give a prompt with --prompt" in call(*generate, expected=2)
    for path in (trained / "data").iterdir():
        if not path.name.startswith("train"):
            shutil.copy(path, tmp_path)
    assert "continuation ---" in call(*generate)


def test_an_unwritable_run_directory_is_refused_before_the_model_is_loaded(trained, tmp_path):
    (tmp_path / "file").touch()
    (checkpoint,) = (trained / "run" / "checkpoints").glob("step_*")
    elsewhere = ["--run_dir", str(tmp_path / "file" / "run"), "--from_checkpoint", str(checkpoint)]
    for command in (["evaluate"], ["evaluate", "passkey"], ["generate"]):
        output = call(*command, "--config", str(trained / "run.yaml"), *elsewhere, expected=2)
        assert "run_dir" in output and "cannot be written (Not a directory)" in output and len(output.splitlines()) == 1
