"""What the launchers say to a wrong command and to --help, before any process is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import local, multinode, rank_processes

HOST = ["--hosts", "127.0.0.1", "--processes_per_host", "2"]


@pytest.fixture(params=["local.py", "multinode.py"])
def launcher(request, monkeypatch):
    """A launcher as a function of the words after its number of processes, or of all its words; it starts nothing."""
    module, processes = (local, ["2"]) if request.param == "local.py" else (multinode, HOST)
    monkeypatch.setattr(module, "StopSignals", object)

    def call(*words: str, bare: bool = False) -> int:
        monkeypatch.setattr(sys, "argv", [request.param, *([] if bare else processes), *words])
        return module.main()

    return call


@pytest.mark.parametrize(
    "command,words",
    [
        ("pretrian", "pretrian is no command; did you mean pretrain?"),
        ("prefligt", "prefligt is no command; did you mean preflight?"),
        ("xyz", "xyz is no command; `infini-train --help` lists them"),
        ("prepare", "prepare is for one process: call infini-train prepare without a launcher"),
    ],
)
def test_a_wrong_command_is_named(command, words, launcher, capsys):
    assert launcher(command, "--config", "run.yaml") == 2
    assert capsys.readouterr().err == f"launch: error: {words}\n"


def test_help_says_what_it_does_and_shows_an_example(launcher, capsys):
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
def test_help_of_a_command_is_printed_once(flag, monkeypatch):
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rank_processes.subprocess, "run", run)
    assert rank_processes.check_configuration(["evaluate", flag], 2) == 0
    assert asked == [[sys.executable, "-m", "infini_train", "evaluate", flag]]


def test_the_examples_name_files_that_are_there():
    for module in (local, multinode):
        words = module.EXAMPLE.split()
        assert (Path(module.__file__).parents[1] / words[words.index("--config") + 1]).is_file()
