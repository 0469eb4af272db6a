"""The checks and files of `submit`, with stub commands in place of SLURM."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.cli.configuration import read_config
from infini_train.cli.main import main
from infini_train.cluster.git_state import write_git_state
from infini_train.cluster.secrets import redact
from infini_train.cluster.submit_job import SubmitOptions, prepare_job, submit
from infini_train.cluster.sweep import sweep_runs
from infini_train.config import LayoutConfig, RunConfig
from infini_train.runtime.errors import UserError
from tests.support.corpus import write_corpus

REPOSITORY = Path(__file__).parents[3]
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path):
    return RunConfig(run_dir=str(tmp_path / "run"), layout=LayoutConfig(pipeline_parallel_size=4))


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("gpus_per_node: 4\nsetup: ['echo ready']\n", encoding="utf-8")
    return path


def test_sweeps_make_every_combination_with_values_of_the_keys_type(run):
    runs = sweep_runs(run, ["optimizer.learning_rate=1e-3,3e-4", "model.update_rule=linear,delta"])
    found = [(each.optimizer.learning_rate, each.model.update_rule) for each in runs]
    assert found == [(1e-3, "linear"), (1e-3, "delta"), (3e-4, "linear"), (3e-4, "delta")]
    assert [each.run_dir for each in runs] == [f"{run.run_dir}/task_{number}" for number in range(4)]
    assert all(each.layout == run.layout for each in runs)


@pytest.mark.parametrize(
    "sweeps,words",
    [
        (["optimizer.learning_rate"], "KEY=VALUE"),
        (["optimizer.learning_rate=1e-3,"], "KEY=VALUE"),
        (["optimizer.rate=1,2"], "optimizer.rate"),
        (["training.rows=8,many"], "training.rows"),
        (["run_dir=a,b"], "run_dir"),
        (["training.rows=8", "training.rows=16"], "training.rows twice"),
    ],
)
def test_invalid_sweeps_are_refused(sweeps, words, run):
    with pytest.raises(UserError, match=words) as error:
        sweep_runs(run, sweeps)
    assert "\n" not in str(error.value)


def test_every_run_is_validated_for_the_processes_of_the_job(run, profile):
    assert prepare_job(run, SubmitOptions(profile=str(profile), nodes=2)).processes == 8
    with pytest.raises(UserError, match=r"training\.rows"):
        prepare_job(run, SubmitOptions(profile=str(profile), nodes=2, sweeps=["training.rows=8,9"]))
    with pytest.raises(UserError, match="--nodes is 0"):
        prepare_job(run, SubmitOptions(profile=str(profile), nodes=0))


def test_a_dry_run_prints_the_script_and_writes_nothing(run, profile, capfd):
    options = [
        "--profile",
        str(profile),
        "--nodes",
        "2",
        "--sweep",
        "training.seed=1,2",
        "--sweep",
        "model.update_rule=linear,delta",
    ]
    assert main(["submit", "--run_dir", run.run_dir, "--layout.pipeline_parallel_size", "4", *options, "--dry-run"]) == 0
    script = capfd.readouterr().out
    assert script.startswith("#!/bin/bash\n") and "#SBATCH --array=0-3\n" in script and "#SBATCH --nodes=2\n" in script
    assert not Path(run.run_dir).exists()


def test_a_run_too_large_for_the_profiles_gpus_is_refused(tmp_path, capsys):
    profile = tmp_path / "small.yaml"
    profile.write_text("gpus_per_node: 8\ngpu: a100-40gb\n", encoding="utf-8")
    options = ["submit", "--config", "configs/8b.yaml", "--profile", str(profile), "--dry-run", "--nodes"]
    assert main([*options, "1"]) == 2
    error = capsys.readouterr().err
    assert "a100-40gb has 36.0 GB" in error and error.endswith("(--gpus is --nodes × 8)\n") and error.count("\n") == 1
    assert main([*options, "16"]) == 2
    assert "it fits with --training.recompute_layers 31" in capsys.readouterr().err
    assert main([*options, "16", "--training.recompute_layers", "31"]) == 0
    profile.write_text("gpus_per_node: 8\ngpu: b300\n", encoding="utf-8")
    assert main([*options, "1"]) == 2
    assert "h100-80gb" in capsys.readouterr().err


def test_the_plan_uses_the_node_size_of_the_profile(tmp_path):
    """A tensor-parallel group of 8 spans two nodes with 4 GPUs, and fits on one with 8."""
    run = read_config(REPOSITORY / "configs" / "8b.yaml")
    run = replace(run, layout=replace(run.layout, tensor_parallel_size=8))
    speeds = []
    for size in (4, 8):
        path = tmp_path / f"{size}.yaml"
        path.write_text(f"gpus_per_node: {size}\ngpu: h100-80gb\n", encoding="utf-8")
        expected = prepare_job(run, SubmitOptions(profile=str(path), nodes=64 // size)).expected
        assert expected is not None
        speeds.append(int(re.search(r"([\d,]+) tokens/s", expected)[1].replace(",", "")))
    assert speeds[0] < 0.9 * speeds[1]


@pytest.mark.parametrize("secret", ["it's-a-password", 'a-"quoted"-one', "back\\slash-$x"])
@pytest.mark.parametrize("place", ["data.path", "environment"])
def test_an_escaped_secret_is_found(secret, place, run, profile, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", secret)
    if place == "data.path":
        run = replace(run, data=replace(run.data, path=f"/data: {secret}"))
    else:
        profile.write_text(f"gpus_per_node: 4\nenvironment: {{URL: {json.dumps('db:' + secret)}}}\n", encoding="utf-8")
    with pytest.raises(UserError, match="PGPASSWORD"):
        prepare_job(run, SubmitOptions(profile=str(profile), nodes=1))
    assert redact(json.dumps([secret])) == '["<PGPASSWORD>"]'


@pytest.mark.parametrize("place", ["run_dir", "profile"])
def test_a_job_that_contains_a_secret_is_refused(place, run, profile, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    if place == "run_dir":
        run = replace(run, run_dir=str(tmp_path / SECRET))
    else:
        profile.write_text(f"setup: ['export KEY={SECRET}']\n", encoding="utf-8")
    with pytest.raises(UserError, match="WANDB_API_KEY") as error:
        prepare_job(run, SubmitOptions(profile=str(profile), nodes=1))
    assert SECRET not in str(error.value)


def test_secrets_are_not_written_to_script_or_run_directory(run, profile, tmp_path, monkeypatch):
    """A stub of sbatch prints a job id; the test inspects the files written before the call."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "sbatch").write_text("#!/bin/sh\npwd > pwd\necho 77\n", encoding="utf-8")
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    prepared = prepare_job(run, SubmitOptions(profile=str(profile), nodes=1, sweeps=["training.seed=1,2"]))
    submission = submit(prepared, "mine")
    folder = Path(run.run_dir)
    assert submission.job_id == "77" and (folder / "pwd").read_text().strip() == str(folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"job.sh", "config.yaml", "git.json", "submission.json"} <= {path.name for path in written}
    assert all(SECRET not in path.read_text(encoding="utf-8") for path in written)
    assert json.loads((folder / "task_1" / "job" / "submission.json").read_text())["job_id"] == "77_1"


@pytest.mark.parametrize("inside", [True, False])
def test_a_job_submitted_inside_another_job_does_not_inherit_its_slurm_variables(inside, run, profile, tmp_path, monkeypatch):
    """With an inherited SLURM_ARRAY_JOB_ID, for example, the job script would requeue the other job."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/env\necho 77\n", encoding="utf-8")
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    other = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2", "SLURM_CPU_BIND": "quiet"}
    for name, value in {**other, "SLURM_CONF": "/etc/slurm.conf", "WANDB_API_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    if inside:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    submit(prepare_job(run, SubmitOptions(profile=str(profile), nodes=1)), "mine")
    seen = (tmp_path / "env").read_text(encoding="utf-8").splitlines()
    assert {"SLURM_CONF=/etc/slurm.conf", f"WANDB_API_KEY={SECRET}"} <= set(seen)
    inherited = {line for line in seen if line.startswith("SLURM_")} - {"SLURM_CONF=/etc/slurm.conf"}
    assert inherited == (set() if inside else {f"{name}={value}" for name, value in other.items()})


@pytest.mark.parametrize(
    ("shown", "alive"),
    [
        ("JobId=77 JobState=RUNNING", True),
        ("JobId=77 JobState=SIGNALING", True),
        ("JobId=77 JobState=SPECIAL_EXIT Reason=JobHeldAdmin", True),
        ("JobId=77 JobState=TIMEOUT", False),
        ("JobId=77 ArrayTaskId=1 JobState=COMPLETED\nJobId=78 ArrayTaskId=0 JobState=RUNNING", True),
        ("JobId=77 ArrayTaskId=1 JobState=COMPLETED\nJobId=78 ArrayTaskId=0 JobState=FAILED", False),
    ],
)
def test_a_second_job_is_refused_while_the_first_is_active(shown, alive, run, profile, tmp_path, monkeypatch):
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"sbatch": "echo 77", "scontrol": f"cat <<'END'\n{shown}\nEND"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    submit(prepare_job(run, SubmitOptions(profile=str(profile), nodes=1, sweeps=["training.seed=1,2"])), "mine")
    again = prepare_job(run, SubmitOptions(profile=str(profile), nodes=1))
    if alive:
        with pytest.raises(UserError, match="has job 77, which is"):
            submit(again, "mine")
    else:
        assert submit(again, "mine").tasks is None


def refusal(capsys, *command: str) -> str:
    assert main([*command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_missing_home_folder_is_refused(profile, capsys):
    assert "run_dir is ~nobody-of-that-name/x" in refusal(
        capsys, "submit", "--profile", str(profile), "--run_dir", "~nobody-of-that-name/x"
    )


def test_a_folder_name_that_is_not_utf_8_is_refused(run, profile, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"the line .*submit_dir='.*caf\\+udce9'.*, which is not text in UTF-8"):
        prepare_job(run, SubmitOptions(profile=str(profile), nodes=1))


def test_a_write_error_after_submission_names_the_job(run, profile, tmp_path, monkeypatch):
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "sbatch").write_text("#!/bin/sh\nmkdir job/submission.json\necho 77\n", encoding="utf-8")
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    with pytest.raises(UserError, match=r"job 77 is submitted, but run_dir .* `scancel 77` ends it"):
        submit(prepare_job(run, SubmitOptions(profile=str(profile), nodes=1)), "mine")


def test_cancel_does_not_signal_a_job_if_it_cannot_prevent_the_requeue(run, profile, tmp_path, monkeypatch, capsys):
    """Without the file `cancelled`, the job would be requeued after the signal."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {
        "sbatch": "echo 77",
        "scontrol": "echo JobId=77 JobState=RUNNING",
        "scancel": f"touch {tmp_path}/told",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    submit(prepare_job(run, SubmitOptions(profile=str(profile), nodes=1)), "mine")
    (Path(run.run_dir) / "job" / "cancelled").symlink_to(tmp_path / "nowhere" / "file")
    assert "`scancel 77` ends it" in refusal(capsys, "cancel", run.run_dir)
    assert not (tmp_path / "told").exists()
    (Path(run.run_dir) / "job" / "cancelled").unlink()
    assert main(["cancel", run.run_dir]) == 0
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("state", "expected"),
    [("RUNNING", "--batch --signal=USR1 77\n"), ("SIGNALING", "--batch --signal=USR1 77\n"), ("SPECIAL_EXIT", "77\n")],
)
def test_cancel_lets_a_running_job_save(state, expected, run, profile, tmp_path, monkeypatch):
    """SIGNALING is the state when `cancel` is called twice and the first signal is not yet delivered."""
    commands = tmp_path / "commands"
    commands.mkdir()
    texts = {"sbatch": "echo 77", "scontrol": f"echo JobId=77 JobState={state}", "scancel": f'echo "$@" > {tmp_path}/told'}
    for name, text in texts.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    submit(prepare_job(run, SubmitOptions(profile=str(profile), nodes=1)), "mine")
    assert main(["cancel", run.run_dir]) == 0
    assert (tmp_path / "told").read_text(encoding="utf-8") == expected


def test_a_negative_number_of_lines_is_refused(run, capsys):
    folder = Path(run.run_dir) / "logs"
    folder.mkdir(parents=True)
    (folder / "77.log").write_text("one\ntwo\n", encoding="utf-8")
    assert "--lines is -1" in refusal(capsys, "logs", run.run_dir, "--lines", "-1")


def test_the_git_state_has_uncommitted_changes_without_secrets(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "code.py").write_text("one\n", encoding="utf-8")
    git("init")
    git("add", "code.py")
    git("commit", "-m", "first")
    git("remote", "add", "origin", f"https://user:{SECRET}@host/project.git")
    (tmp_path / "code.py").write_text(f"two {SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    out = tmp_path / "out"
    out.mkdir()
    write_git_state(tmp_path, out)
    state, diff = json.loads((out / "git.json").read_text()), (out / "git.diff").read_text()
    assert len(state["commit"]) == 40 and state["changed_files"] == [" M code.py"]
    assert state["remote"] == "https://host/project.git"
    assert "-one" in diff and "+two <HF_TOKEN>" in diff and SECRET not in diff


def test_a_dry_run_without_data_prints_the_script_and_a_warning(tmp_path, capsys):
    run_dir = tmp_path / "it's a run"
    arguments = ["submit", "--profile", "cpu", "--nodes", "2", "--dry-run", "--run_dir", str(run_dir)]
    arguments += ["--data.path", str(tmp_path / "nowhere")]
    assert main([*arguments, "--layout.pipeline_parallel_size", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash\n") and captured.err.count("\n") == 1
    words = f"this job would not be submitted yet: data.path {tmp_path}/nowhere does not exist; run `infini-train prepare"
    assert words in captured.err
    assert not run_dir.exists()


def test_the_data_of_every_array_run_is_checked(tmp_path, profile, capsys):
    write_corpus(tmp_path / "text")
    options = ["--data.vocab_size", "512", "--data.held_out_fraction", "0.2", "--layout.pipeline_parallel_size", "4"]
    for name in ("a", "b"):
        assert main(["prepare", "--data.source", str(tmp_path / "text"), "--data.path", str(tmp_path / name), *options]) == 0
    submit_array = ["submit", "--profile", str(profile), "--run_dir", str(tmp_path / "run"), *options]
    sweep = ["--data.path", str(tmp_path / "c"), "--sweep", f"data.path={tmp_path}/a,{tmp_path}/b"]
    capsys.readouterr()
    assert main([*submit_array, *sweep, "--dry-run"]) == 0
    assert capsys.readouterr().err == ""
    sweep = ["--data.path", str(tmp_path / "a"), "--sweep", f"data.path={tmp_path}/a,{tmp_path}/c"]
    assert main([*submit_array, *sweep, "--dry-run"]) == 0
    assert f"this job would not be submitted yet: data.path {tmp_path}/c does not exist" in capsys.readouterr().err
    assert main([*submit_array, *sweep]) == 2
    assert f"error: data.path {tmp_path}/c does not exist" in capsys.readouterr().err


def test_the_commands_of_the_slurm_page_prepare_the_data_that_they_submit(tmp_path, capsys, monkeypatch):
    page = (REPOSITORY / "docs" / "slurm.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in page.split("```")[1].strip().splitlines()]
    write_corpus(tmp_path / "text")
    mine = {
        "/path/to/text": str(tmp_path / "text"),
        "vocab_size: 128000": "vocab_size: 512",
        "held_out_fraction: 0.001": "held_out_fraction: 0.2",
    }
    for source, copy in (words[1:] for words in lines if words[0] == "cp"):
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        for before, after in mine.items():
            text = text.replace(before, after)
        (tmp_path / copy).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    (prepare,) = (words[1:] for words in lines if words[:2] == ["infini-train", "prepare"])
    dry, real = (words[1:] for words in lines if words[:2] == ["infini-train", "submit"])
    assert main(prepare) == 0
    capsys.readouterr()
    assert main(dry) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash\n") and captured.err == ""
    assert dry == [*real, "--dry-run"]


@pytest.mark.parametrize(
    "record",
    [
        '{"step": 3}',
        '{"step": 3, "tokens_per_second": "many", "step_seconds": 1}',
        '{"step": 3, "tokens_per_second": 1, "step_seconds": 1, "loss": "low"}',
        '{"step": 3, "tokens_per_second": 1, "step_seconds": 1e300}',
        '{"step": 3, "tokens_per_second": 1, "step_seconds": NaN}',
    ],
)
def test_status_with_an_invalid_metrics_record(record, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(record + "\n")
    (tmp_path / "config.yaml").write_text("training:\n  steps: 10\n")
    assert main(["status", str(tmp_path)]) == 0
    assert "the last record of metrics.jsonl is not that of a step" in capsys.readouterr().out


def test_status_with_invalid_configuration_and_excluded_nodes(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "tokens_per_second": 1, "step_seconds": 1, "loss": 2}\n')
    (tmp_path / "config.yaml").write_text("training:\n  steps: .inf\n")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "excluded").write_bytes(b"node\xe9\n")
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "step 3, loss 2.0000, 1 tokens/s\n" in printed and "excluded    node" in printed


@pytest.mark.parametrize("change", [{"job_id": 77}, {"tasks": "two"}, {"job": "77"}])
@pytest.mark.parametrize("command", ["status", "cancel", "logs"])
def test_an_invalid_submission_file_is_reported_in_one_line(command, change, tmp_path, capsys):
    (tmp_path / "job").mkdir()
    whole = {"job_id": "77", "submitted": "", "profile": "mine", "nodes": 1, "processes": 4}
    (tmp_path / "job" / "submission.json").write_text(json.dumps({**whole, **change}), encoding="utf-8")
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "job/submission.json cannot be read" in error


@pytest.mark.parametrize("command", ["status", "cancel", "logs"])
@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_a_folder_without_a_run_is_reported_in_one_line(command, kind, tmp_path, capsys):
    path = {"folder": tmp_path, "file": tmp_path / "file", "nothing": tmp_path / "nothing"}[kind]
    (tmp_path / "file").touch()
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"{path} h" in error[0]
