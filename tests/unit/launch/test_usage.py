"""Messages of the launchers for a wrong command and for --help, before any process is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import local, multinode, rank_processes

HOST = ["--hosts", "127.0.0.1", "--processes_per_host", "2"]


@pytest.fixture(params=["local.py", "multinode.py"])
def launcher(request, monkeypatch):
    """Return a function that runs a launcher with a command, or with `bare` arguments only. It starts no process."""
    module, processes = (local, ["2"]) if request.param == "local.py" else (multinode, HOST)
    monkeypatch.setattr(module, "StopSignals", object)

    def call(*words: str, bare: bool = False) -> int:
        monkeypatch.setattr(sys, "argv", [request.param, *([] if bare else processes), *words])
        return module.main()

    return call


@pytest.mark.parametrize(
    "command,words",
    [
        ("pretrian", "pretrian is not a command; did you mean pretrain?"),
        ("prefligt", "prefligt is not a command; did you mean preflight?"),
        ("xyz", "xyz is not a command; `infini-train --help` lists them"),
        ("prepare", "prepare is for one process: call infini-train prepare without a launcher"),
    ],
)
def test_a_wrong_command_is_named(command, words, launcher, capsys):
    assert launcher(command, "--config", "run.yaml") == 2
    assert capsys.readouterr().err == f"launch: error: {words}\n"


def test_help_has_a_description_and_an_example(launcher, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher("--help", bare=True)
    assert not ended.value.code
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Run an infini-train command on several" in captured.out
    assert "pretrain --config configs/" in captured.out.split("example")[1]


@pytest.mark.parametrize("arguments", [[], ["2"], ["pretrain", "--config", "x"], ["0", "pretrain"], ["²", "pretrain"]])
def test_wrong_usage_of_the_local_launcher_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local.py", *arguments])
    assert local.main() == 2
    assert "--help" in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_help_of_a_command_is_printed_by_one_process(flag, monkeypatch):
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rank_processes.subprocess, "run", run)
    assert rank_processes.check_configuration(["evaluate", flag], 2) == 0
    assert asked == [[sys.executable, "-m", "infini_train", "evaluate", flag]]


def test_the_examples_name_existing_files():
    for module in (local, multinode):
        words = module.EXAMPLE.split()
        assert (Path(module.__file__).parents[1] / words[words.index("--config") + 1]).is_file()
