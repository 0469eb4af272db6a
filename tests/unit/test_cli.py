"""The command line: flags, errors in one line with exit code 2, and files in configs/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.cli import COMMANDS, WITHOUT_CONFIG, build_parser, main
from infini_train.validation import validate

REPOSITORY = Path(__file__).parents[2]
FLAGS = Path(__file__).with_name("flags.txt")


def command_flags() -> list[str]:
    subcommands = build_parser()._subcommands_action.choices
    return sorted(f"{name} {option}" for name, parser in subcommands.items() for option in parser._option_string_actions)


def test_flags_are_frozen():
    """They are a promise: change flags.txt on purpose, together with the README where it names them."""
    assert command_flags() == FLAGS.read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["pretrain", "--model.segmentlength", "3"], "model.segmentlength"),
        (["pretrain", "--model.segment_length", "abc"], "model.segment_length"),
        (["pretrain", "--config", "nowhere.yaml"], "--config: there is no file"),
        (["pretrain", "--config", "configs"], "--config: this is a folder, not a file"),
        (["pretrain", "--model.attention", "quadratic"], "model.attention"),
        (["pretrain", "--training.micro_batches_per_window", "1"], "training.micro_batches_per_window"),
        (["pretrain", "--layout.pipeline_parallel_size", "2"], "pipeline_parallel_size 2 does not fit 1 process"),
        (["pretrain", "--data.path", "nowhere"], "data.path"),
        (["evaluate", "--data.path", "nowhere"], "data.path"),
        (["prepare", "--data.source", "nowhere"], "nowhere"),
        (["report", "--run_dir", "nowhere"], "metrics.jsonl"),
        (["evaluate-all"], "evaluate-all"),
        (["submit"], "required: --profile"),
        (["plan"], "required: --gpus, --gpu"),
        (["submit", "--profile", "no-such-cluster"], "known are a100-infiniband"),
        (["prepare", "--task.min_keys", "x"], "task.min_keys is x; it must be a whole number, or null"),
        (["prepare", "--task.lengths", "5"], "task.lengths is 5; it must be a list"),
        (["pretrain", "--model.update_rule", "hebb"], "model.update_rule is hebb; it must be one of linear, delta"),
        (
            ["prepare", "--task.kind", "maze"],
            "it must be one of passkey, multi_key, multi_value, associative_recall, babi, or null",
        ),
        (["pretrain", "--layout.virtual_stage", "2"], "did you mean layout.virtual_stages?"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("infini-train: error: ")
    assert words in lines[0]


@pytest.mark.parametrize("text, where", [("model: [", "line 2, column 1"), ("\0", "position 0")])
def test_a_file_that_is_no_yaml_is_said_with_its_place(text, where, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"--config: the file is not YAML ({where}): " in capsys.readouterr().err


def test_an_unknown_key_in_a_file_names_it_and_its_neighbour(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model:\n  segment_lenght: 64\n", encoding="utf-8")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "model.segment_lenght" in (line := capsys.readouterr().err)
    assert "model.segment_length" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_prints_its_config(command):
    checks = [("--help", "segments_per_micro_batch"), ("--print_config", "segments_per_micro_batch: 1")]
    if command in WITHOUT_CONFIG:
        checks = [("--help", "consolidate" if command == "checkpoint" else "folder of the run")]
    for flag, expected in checks:
        result = subprocess.run(
            [sys.executable, "-m", "infini_train", command, flag], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0
        assert expected in result.stdout


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_is_valid(path):
    from infini_train.cli import _parse, _run_config

    run = _run_config(_parse(["pretrain", "--config", str(path)]).pretrain)
    validate(run, run.layout.model_processes)
    assert path.read_text(encoding="utf-8").startswith("#"), "a comment at its head says which hardware and layout"


def test_every_key_has_help():
    """`--help` explains each key."""
    import re

    from infini_train import config

    source = Path(config.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    for number, line in enumerate(lines):
        field = re.match(r"    (\w+): .* = ", line)
        if field and "field(default_factory" not in line:
            assert lines[number + 1].strip().startswith('"""'), f"{field[1]} has no docstring"


def test_wrong_configuration_is_refused_without_importing_torch():
    code = (
        "import sys; from infini_train.cli import main; code = main(['pretrain', '--data.path', 'nowhere']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
