"""The command line: flags, one-line errors with exit code 2, and the files in configs/."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from infini_train.cli import generate
from infini_train.cli.command_list import COMMANDS
from infini_train.cli.configuration import read_config
from infini_train.cli.main import main
from infini_train.cli.parser import build_parser
from infini_train.config.messages import USAGE
from infini_train.config.validation import validate
from infini_train.data.documents import DocumentSource

REPOSITORY = Path(__file__).parents[3]
FLAGS = Path(__file__).with_name("flags.txt")


def command_flags() -> list[str]:
    subcommands = build_parser()._subcommands_action.choices
    return sorted(f"{name} {option}" for name, parser in subcommands.items() for option in parser._option_string_actions)


def test_flags_are_frozen():
    """The flags are a public interface. Change flags.txt only on purpose, together with the README if it names the flag."""
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
        (["status"], "required: RUN; write `infini-train status RUN`"),
        (["status", "--run", "runs/8b"], "unrecognized arguments: --run; write `infini-train status RUN`"),
        (["logs", "--run_dir=runs/8b"], "unrecognized arguments: --run_dir=runs/8b; write `infini-train logs RUN [--follow]"),
        (["cancel", "runs/8b", "runs/1b"], "unrecognized arguments: runs/1b; write `infini-train cancel RUN [--now]`"),
        (["checkpoint"], "required: ACTION; write `infini-train checkpoint ACTION [--config FILE] [--run_dir RUN]"),
        (["checkpoint", "list", "runs/8b"], "unrecognized arguments: runs/8b; write `infini-train checkpoint ACTION"),
        (["submit", "--profile", "no-such-cluster"], "known are a100-infiniband"),
        (["prepare", "--task.min_keys", "x"], "task.min_keys is x; it must be a whole number, or null"),
        (["prepare", "--task.lengths", "5"], "task.lengths is 5; it must be a list"),
        (["pretrain", "--model.update_rule", "hebb"], "model.update_rule is hebb; it must be one of linear, delta"),
        (
            ["prepare", "--task.kind", "maze"],
            "it must be one of passkey, multi_key, multi_value, associative_recall, babi, or null",
        ),
        (["pretrain", "--layout.virtual_stage", "2"], "did you mean --layout.virtual_stages?"),
        (["pretrain", "--modle.segment_length", "2"], "did you mean --model.segment_length?"),
        (["pretrain", "--modle.a", "2"], "did you mean the section model?"),
        (["generate", "--new_tokens", "5"], "unrecognized arguments: --new_tokens 5; did you mean --max_new_tokens?"),
        (["checkpoint", "list", "--rundir", "x"], "did you mean --run_dir?"),
        (["checkpoint", "lst"], "lst is not one of list, verify, inspect, consolidate; did you mean list?"),
        (["checkpoint", "list", "--path", "x"], "--path is x, but list shows all checkpoints of --run_dir"),
        (["pretrian"], "did you mean pretrain?"),
        (["status", "runs/x", "--config", "x"], "unrecognized arguments: --config x; write `infini-train status RUN`"),
        (["checkpoint", "list", "--config", "nowhere.yaml"], "--config: there is no file"),
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
def test_invalid_yaml_is_reported_with_its_position(text, where, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"--config: the file is not YAML ({where}): " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "--config: the file holds nothing, but no keys under sections"),
        (b"model:\n", "--config: the file holds model:, but no keys under sections"),
        (b"- 3\n", "--config: the file holds - 3, but"),
        (b"model: 3\n", "model is 3 in the configuration, but it is a section"),
        (b"training: {steps: }\n", "training.steps has no value; give it one, or leave it out"),
        (b"optimizer: {learning_rate: .nan}\n", "optimizer.learning_rate is nan; it must be a finite number"),
        (b"model: {initial_gate: .inf}\n", "model.initial_gate is inf; it must be a finite number"),
        (b"model: {initial_gate: 1.0e+300}\n", "model.initial_gate is 1e+300; use a number of at most 3e+38"),
        (
            b"checkpoint: {timeout_seconds: 1.0e+10}\n",
            "checkpoint.timeout_seconds is 10000000000.0; use a number of at most 1e+09",
        ),
        (b"\xff\xfe\n", "--config: the file is not text in UTF-8"),
    ],
)
def test_files_that_are_not_a_configuration_are_refused(content, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(content)
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert words in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.mark.parametrize(
    "options,words",
    [
        (["--temperature", "-1"], "--temperature is -1.0; use 0 for the most likely token, or at least 0.001"),
        (["--temperature", "1e-300"], "--temperature is 1e-300"),
        (["--top_k", "-5"], "--top_k is -5; use a number from 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; use a number from 1"),
        (["--sample_seed", str(10**23)], "--sample_seed is 100000000000000000000000"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given; give one"),
        (["--prompt", "a\udcff"], "--prompt is not text in UTF-8"),
    ],
)
def test_invalid_sampling_options_are_refused_before_the_model_is_loaded(options, words, capsys):
    assert main(["generate", *options]) == 2
    assert words in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_a_prompt_from_a_file_is_read_as_prepare_reads_text(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        generate, "with_model", lambda run, arguments, action, check: action(SimpleNamespace(generate=take), run, None)
    )

    def take(run, checkpoint, prompt, *sampling):
        found.append(prompt)

    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    main(["generate", "--prompt_file", str(tmp_path / "prompt.txt")])
    assert found == ["one\r\ntwo\n"] == [document.text for document in DocumentSource(str(tmp_path))]


@pytest.mark.parametrize(
    "options,words",
    [
        (["verify", "--path", "nowhere"], "--path nowhere: there is no such folder"),
        (["list"], "holds no checkpoint"),
    ],
)
def test_missing_checkpoints_are_reported(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("rank,local_rank,reported", [("0", "0", True), ("1", "1", False), ("8", "0", True), ("9", "1", False)])
def test_the_first_rank_of_each_node_reports_an_error(rank, local_rank, reported, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["pretrain", "--data.path", "nowhere"]) == 2
    line = capsys.readouterr().err
    assert ("data.path nowhere does not exist" in line) == reported
    assert ("rank 8 on " in line) == (rank == "8")


def test_an_unknown_key_in_a_file_is_reported_with_the_nearest_key(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model:\n  segment_lenght: 64\n", encoding="utf-8")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "model.segment_lenght" in (line := capsys.readouterr().err)
    assert "model.segment_length" in line


@pytest.mark.parametrize(
    "text,words",
    [
        ("modle: {a: 3}\n", "modle.a is not a configuration key; did you mean the section model?"),
        (
            "modle: {segment_lenght: 3}\n",
            "modle.segment_lenght is not a configuration key; did you mean model.segment_length?",
        ),
        ("modle: 3\n", "modle is not a configuration key; did you mean model?"),
        ("segment_length: 3\n", "segment_length is not a configuration key; did you mean model.segment_length?"),
        ("xyzzy: {a: {b: 3}}\n", "xyzzy.a.b is not a configuration key; `--help` lists the valid names"),
    ],
)
def test_an_unknown_key_is_reported_with_its_file_if_there_are_several(text, words, tmp_path, capsys):
    (tmp_path / "good.yaml").write_text("model: {segment_length: 64}\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    files = ["--config", str(tmp_path / "bad.yaml"), f"--config={tmp_path / 'good.yaml'}"]
    for order in (files, ["--config", str(tmp_path / "good.yaml"), f"--config={tmp_path / 'bad.yaml'}"]):
        assert main(["pretrain", *order]) == 2
        assert capsys.readouterr().err == f"infini-train: error: --config {tmp_path / 'bad.yaml'}: {words}\n"


@pytest.mark.parametrize(
    "options,found",
    [
        (["--config", "bad.yaml", "--config", "run.yaml"], "of_the_file"),
        (["--config", "run.yaml", "--config", "other.yaml"], "of_the_file"),
        (["--run_dir", "of_the_flag", "--config", "run.yaml"], "of_the_flag"),
        ([], "runs/default"),
    ],
)
def test_checkpoint_takes_the_run_directory_of_a_file(options, found, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("run_dir: of_the_file\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("run_dir: elsewhere\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("model: {segment_length: 64}\n", encoding="utf-8")
    assert main(["checkpoint", "verify", *options]) == 2
    assert f"run_dir {found} holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_prints_its_config(command):
    checks = [("--help", "segments_per_micro_batch"), ("--print_config", "segments_per_micro_batch: 1")]
    if f"{command} --print_config" not in command_flags():
        words = {"checkpoint": "consolidate", "convert": "folder of transformers"}
        checks = [("--help", words.get(command, "folder of the run"))]
    for flag, expected in checks:
        result = subprocess.run(
            [sys.executable, "-m", "infini_train", command, flag], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0
        assert expected in result.stdout


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_is_valid(path):
    run = read_config(path)
    validate(run, run.layout.model_processes)
    assert path.read_text(encoding="utf-8").startswith("#"), "a comment at the head of the file names hardware and layout"


def test_usage_names_every_option_of_commands_with_positional_arguments():
    flags = command_flags()
    for command, usage in USAGE.items():
        assert {f"{command} {option}" for option in re.findall(r"--\w+", usage)} <= set(flags)
    missing = [flag for flag in flags if flag.split()[0] in USAGE and flag.split()[1] not in USAGE[flag.split()[0]]]
    assert {flag.split()[1] for flag in missing} <= {"--help", "-h"}, missing


def test_every_key_has_help():
    """`--help` explains each key with the docstring below the field."""
    from infini_train.config import schema as config

    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    keys = 0
    for holder in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for field, after in pairwise([*holder.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (
                    f"{ast.unparse(field.target)} has none"
                )
                keys += 1
    assert keys > 100


def test_invalid_configuration_is_refused_without_importing_torch():
    code = (
        "import sys; from infini_train.cli.main import main; code = main(['pretrain', '--data.path', 'nowhere']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
