"""`evaluate` and `generate` of a trained run, where something around it is not as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from infini_train.config import save_config
from tests.corpus import small_run, write_corpus
from tests.distributed.command import call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml and a run of three steps."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_corpus(folder / "text")
    save_config(small_run(folder), folder / "run.yaml")
    config = ["--config", str(folder / "run.yaml")]
    call("prepare", *config)
    call("pretrain", *config, "--training.steps", "3")
    return folder


def test_a_result_whose_file_cannot_be_written_is_printed(trained):
    """A link to /dev/full is a full disk."""
    config, run_dir = ["--config", str(trained / "run.yaml")], trained / "run"
    for name, command, shown in (
        ("evaluation", ["evaluate"], "held-out loss"),
        ("generation", ["generate", "--prompt", "a", "--max_new_tokens", "3"], "the model goes on"),
    ):
        full = run_dir / f"{name}.json.new"
        full.symlink_to("/dev/full")
        output = call(*command, *config, expected=2)
        full.unlink()
        assert shown in output and f"{name}.json cannot be written (No space left on device)" in output
        assert not (run_dir / f"{name}.json").exists()


def test_a_run_directory_that_cannot_be_written_is_refused_before_the_model_is_read(trained, tmp_path):
    (tmp_path / "file").touch()
    (checkpoint,) = (trained / "run" / "checkpoints").glob("step_*")
    elsewhere = ["--run_dir", str(tmp_path / "file" / "run"), "--from_checkpoint", str(checkpoint)]
    for command in (["evaluate"], ["evaluate", "passkey"], ["generate"]):
        output = call(*command, "--config", str(trained / "run.yaml"), *elsewhere, expected=2)
        assert "run_dir" in output and "cannot be written (Not a directory)" in output and len(output.splitlines()) == 1
