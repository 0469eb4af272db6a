"""Result files: results are printed before they are written, and a write error is reported in one line."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint import folder
from infini_train.checkpoint import inspection as checkpoint_commands
from infini_train.cli.main import main
from infini_train.evaluation import retrieval_command
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import check_writable, write_result


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)


def test_write_error_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "evaluation.json"
    target.write_text("old")
    (tmp_path / "evaluation.json.new").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^\S*evaluation\.json cannot be written \(No space left on device\); .*--run_dir"):
        write_result(target, "new")
    assert target.read_text() == "old"
    (tmp_path / "evaluation.json.new").unlink()
    write_result(target, "new")
    assert target.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_check_writable_refuses_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run_dir x cannot be written \(Not a directory\); .*--run_dir"):
        check_writable(tmp_path / "file" / "run", "run_dir x")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(Path("/proc/self"), "run_dir /proc/self")
    check_writable(tmp_path / "run", "run_dir run")
    assert list((tmp_path / "run").iterdir()) == []


def test_report_prints_numbers_before_a_write_error(tmp_path, full_disk, capsys) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    assert main(["report", "--run_dir", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "training loss: 3.000" in printed.out
    assert "report.html cannot be written (No space left on device)" in printed.err and printed.err.count("\n") == 1


def test_write_error_of_a_cell_does_not_stop_the_measurement(tmp_path: Path, full_disk: None) -> None:
    error = retrieval_command._try_write(tmp_path / "passkey.json", {"cells": []})
    assert isinstance(error, UserError) and "passkey.json cannot be written" in str(error)


def test_weights_on_a_full_disk_are_one_error_line_and_leave_no_file(tmp_path, monkeypatch) -> None:
    """safetensors raises its own exception when the disk is full."""
    weights = {"a": torch.ones(1 << 18)}
    monkeypatch.setattr(checkpoint_commands, "read_model", lambda *_, **__: weights)
    facts = {"step": 1, "config": {}, "tokenizer_fingerprint": "f00d"}
    monkeypatch.setattr(folder, "read_state_file", lambda _: facts)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most))  # refuses with the same exception as a full disk
    try:
        with pytest.raises(UserError, match=r"^--output \S*w\.safetensors cannot be written \(.*too large.*\); .*--output$"):
            checkpoint_commands.consolidate(tmp_path, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert list(tmp_path.iterdir()) == []
