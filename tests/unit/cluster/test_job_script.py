"""The rendered job script: golden files, shell injection, and runs of the script with stub commands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.cluster.cluster_profile import PROFILES, ClusterProfile, load_profile, validate_profile
from infini_train.cluster.job_script import PROJECT, Job, job_name, render_job
from infini_train.runtime.errors import UserError

GOLDEN = Path(__file__).with_name("golden")
JOB = Job(
    run_dir=Path("/data/runs/8b"),
    name="8b",
    nodes=8,
    time_limit="24:00:00",
    submit_dir=Path("/home/user/infini_train"),
    python="/home/user/infini_train/.venv/bin/python",
)
ARRAY = replace(JOB, tasks=3, max_parallel=2, exclude="node[07-09],node12")
HOSTILE = [
    "two words",
    "it's",
    'a "quote"',
    "$(touch canary)",
    "`touch canary`",
    "a;touch canary",
    "a&touch canary",
    "a|touch canary",
    "> canary",
    "${HOME}",
    "-rf",
    "--wrap=touch canary",
    "*",
    "~",
    "!!",
    "# comment",
    "é ü 漢",
]
REFUSED = ["a\ntouch canary", "a\r\ntouch canary", "a\ttab", "50%j", "back\\slash", "a\x1b[2J"]


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
@pytest.mark.parametrize("job", [JOB, ARRAY], ids=["single", "array"])
def test_rendered_scripts_match_golden_files(name, job):
    """Update the files with `UPDATE_GOLDEN=1 pytest tests/unit/cluster/test_job_script.py`, then review the diff."""
    path = GOLDEN / f"{name}-{'single' if job.tasks is None else 'array'}.sh"
    script = render_job(job, load_profile(name)).replace(f"project={PROJECT}\n", "project=/home/user/infini_train\n")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(script, encoding="utf-8")
    assert script == path.read_text(encoding="utf-8")


def variables(script: str, folder: Path, names: list[str]) -> list[str]:
    """Run the script up to its first function, and return the values of variables. Fail if the script created a file."""
    head = script.split("\njob_dir=")[0]
    printing = "".join(f'\nprintf "%s\\0" "${name}"' for name in names)
    path = folder / "head.sh"
    path.write_text(head + printing, encoding="utf-8")
    result = subprocess.run(
        ["bash", str(path)], capture_output=True, text=True, cwd=folder, check=True, env={"PATH": os.environ["PATH"]}
    )
    assert sorted(each.name for each in folder.iterdir()) == ["head.sh"], "something was executed"
    assert result.stderr == ""
    return result.stdout.split("\0")[:-1]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_not_executed(value, tmp_path):
    profile = ClusterProfile(
        gpus_per_node=8,
        environment={"NCCL_DEBUG_FILE": value},
        container_image=value,
        container_mounts=[f"{value}:/mnt"],
        preflight=True,
    )
    job = replace(JOB, run_dir=Path("/runs") / value, submit_dir=Path("/home") / value, python=f"/opt/{value}/python")
    script = render_job(replace(job, name=job_name(job.run_dir)), profile)
    names = ["run_dir", "submit_dir", "python", "NCCL_DEBUG_FILE"]
    assert variables(script, tmp_path, names) == [f"/runs/{value}", f"/home/{value}", f"/opt/{value}/python", value]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    directives = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) > 8 and all(re.fullmatch(r"[A-Za-z0-9_.=:/@%,+-]+", each) for each in directives), directives


@pytest.mark.parametrize("value", HOSTILE)
def test_container_arguments_reach_srun_unchanged(value, tmp_path):
    """A stub of srun prints its arguments."""
    profile = ClusterProfile(container_image=value, container_mounts=[f"{value}:/mnt", "/data:/data"])
    script = render_job(JOB, profile)
    function = script[script.index("on_all_ranks() {") : script.index("\n}\n", script.index("on_all_ranks() {")) + 3]
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    run = f"interrupted=\n{function}\non_all_ranks one 'two words'"
    result = subprocess.run(
        ["bash", "-c", run], capture_output=True, text=True, cwd=tmp_path, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    arguments = result.stdout.split("\0")[:-1]
    assert f"--container-image={value}" in arguments and f"--container-mounts={value}:/mnt,/data:/data" in arguments
    assert arguments[-3:] == ["rank", "one", "two words"]
    assert [each.name for each in tmp_path.iterdir()] == ["srun"]


@pytest.mark.parametrize("value", REFUSED)
def test_a_run_dir_that_slurm_would_interpret_is_refused(value):
    with pytest.raises(UserError, match="run_dir") as error:
        render_job(replace(JOB, run_dir=Path("/runs") / value), ClusterProfile())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*HOSTILE[:-1], *REFUSED, ""])
@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "memory_per_node"])
def test_hostile_options_are_refused(key, value):
    if key == "constraint" and value == "*":
        pytest.skip("a star is part of SLURM's syntax for constraints only inside of one")
    with pytest.raises(UserError, match=key) as error:
        validate_profile(ClusterProfile(**{key: value}), "profile")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*HOSTILE, *REFUSED, ""])
def test_hostile_job_names_and_exclusions_are_refused(value):
    for option in ("name", "exclude"):
        with pytest.raises(UserError, match=f"--{option}"):
            render_job(replace(JOB, **{option: value}), ClusterProfile())


@pytest.mark.parametrize("value", [*HOSTILE, *REFUSED])
def test_any_folder_name_gives_a_valid_job_name(value):
    assert render_job(replace(JOB, name=job_name(Path("/runs") / value)), ClusterProfile())


@pytest.mark.parametrize(
    "change,words",
    [
        ({"environment": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY"),
        ({"environment": {"A;B": "x"}}, "A;B"),
        ({"environment": {"A": "x\ny"}}, "environment.A"),
        ({"time_limit": "one day"}, "time_limit"),
        ({"gpus_per_node": 0}, "processes_per_node"),
        ({"gpus_per_node": 4, "processes_per_node": 8}, "processes_per_node is 8, but gpus_per_node is 4"),
        ({"gpu_directive": "gpus"}, "gpu_directive"),
        ({"max_failures": 0}, "max_failures"),
        ({"max_restarts": -1}, "max_restarts"),
    ],
)
def test_invalid_profiles_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        validate_profile(ClusterProfile(**change), "profile")


def test_a_time_limit_without_time_to_save_is_refused():
    with pytest.raises(UserError, match="signal_seconds"):
        render_job(replace(JOB, time_limit="00:05:00"), ClusterProfile(signal_seconds=300))


def test_the_error_for_an_unknown_profile_lists_the_profiles():
    with pytest.raises(UserError, match="h100-infiniband"):
        load_profile("h200")


def test_an_unknown_profile_key_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("partitoin: gpu\n", encoding="utf-8")
    with pytest.raises(UserError, match="partitoin"):
        load_profile(str(tmp_path / "mine.yaml"))


OPTIONAL = {
    "partition",
    "account",
    "qos",
    "constraint",
    "gpu",
    "processes_per_node",
    "memory_per_node",
    "python",
    "container_image",
}


@pytest.mark.parametrize("key", sorted(ClusterProfile.__dataclass_fields__))
def test_a_profile_key_without_a_value_is_refused_unless_null_is_allowed(key, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{key}:\n" + ("partition: gpu\n" if key != "partition" else "qos: high\n"), encoding="utf-8")
    if key in OPTIONAL:
        assert getattr(load_profile(str(path)), key) is None
        return
    with pytest.raises(UserError, match=f"{key} has no value; give it one, or leave it out"):
        load_profile(str(path))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- partition\n", "partition\n"])
def test_a_profile_without_keys_is_refused(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="holds no keys with values; slurm/profiles/ has files to start from"):
        load_profile(str(path))


def test_the_error_for_a_profile_that_is_not_yaml_names_the_profile(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("partition: [\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"--profile {path}: the file is not YAML"):
        load_profile(str(path))


SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo first; echo second ;;
  "show node") echo "NodeName=first NodeAddr=10.0.0.1 State=ALLOCATED" ;;
  "show job") echo "JobId=7 Restarts=0" ;;
esac
"""
SRUN = """#!/bin/bash
printf '%s\\0' "$MASTER_ADDR:$MASTER_PORT" "$@" >>"{calls}"
exit {code}
"""


SRUN_WHILE_CANCELLED = """#!/bin/bash
touch "{run_dir}/job/cancelled"
kill -USR1 "$(ps -o ppid= -p "$PPID")"
sleep 0.5
exit 138
"""


def job_with_stubs(folder: Path, code: int, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a container job on a host without the image's interpreter, and return the result and the arguments of srun.

    Args:
        code: exit code of the ranks.
        more: scripts of additional stub commands, or replacements of the default ones, by name.
    """
    commands, calls = folder / "commands", folder / "calls"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN.format(calls=calls, code=code), **more}.items():
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    profile = load_profile("h100-efa")
    assert profile.python is not None and not Path(profile.python).exists()
    job = replace(JOB, run_dir=folder / "run", submit_dir=folder, python=profile.python)
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second"}
    result = subprocess.run(
        ["bash"], input=render_job(job, profile), capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    return result, calls.read_text(encoding="utf-8").split("\0") if calls.exists() else []


def test_ranks_start_with_the_interpreter_of_the_image(tmp_path):
    result, calls = job_with_stubs(tmp_path, code=0)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == "" and (tmp_path / "run" / "job" / "finished").exists()
    assert calls.count("--container-image=/fsx/images/infini-train.sqsh") == 2
    assert calls.count(f"--container-workdir={tmp_path}") == 2
    assert calls.count("/opt/infini-train/bin/python") == 2 and "pretrain" in calls
    meetings = [re.fullmatch(r"10\.0\.0\.1:(\d+)", each) for each in calls]
    ports = [int(each[1]) for each in meetings if each]
    assert len(ports) == 2 and all(10000 <= port < 30000 for port in ports)


def test_a_job_cancelled_during_the_preflight_is_not_requeued(tmp_path):
    srun = SRUN_WHILE_CANCELLED.format(run_dir=tmp_path / "run")
    result, _ = job_with_stubs(tmp_path, code=0, srun=srun, scancel="#!/bin/bash\n")
    assert "told to stop; ranks save" in result.stdout and "cancelled (exit code 138)" in result.stdout
    assert "requeue" not in result.stdout and result.returncode == 138


def test_setup_commands_may_read_unset_variables(tmp_path):
    """Scripts that activate an environment do so. The rest of the job script still runs with `set -u`."""
    script = render_job(JOB, ClusterProfile(setup=['export FOUND="$NOT_SET/lib"']))
    assert variables(script, tmp_path, ["FOUND"]) == ["/lib"]
    head = script.split("\njob_dir=")[0]
    result = subprocess.run(["bash"], input=f'{head}\necho "$NOT_SET"', capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "NOT_SET: unbound variable" in result.stderr


def test_a_missing_interpreter_is_named(tmp_path):
    result, _ = job_with_stubs(tmp_path, code=127)
    assert "requeued: /opt/infini-train/bin/python is not there where the ranks run; failure 1 of 3" in result.stdout


@pytest.mark.parametrize("family,address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::1")])
def test_a_port_in_use_is_not_chosen(family, address):
    script = render_job(JOB, ClusterProfile())
    function = script[script.index("free_port() {") : script.index("\n}\n", script.index("free_port() {")) + 3]
    with socket.socket(family) as listener:
        taken = next(port for port in range(10000, 29999) if bound(listener, address, port))
        listener.listen()
        # After `unset`, RANDOM is an ordinary variable that keeps the assigned value.
        drawn = f"unset RANDOM; RANDOM={taken - 10000}; {function}\nfree_port"
        result = subprocess.run(["bash", "-c", drawn], capture_output=True, text=True, check=True)
        assert taken < int(result.stdout) < taken + 100
    result = subprocess.run(["bash", "-c", drawn], capture_output=True, text=True, check=True)
    assert int(result.stdout) == taken


def bound(listener: socket.socket, address: str, port: int) -> bool:
    try:
        listener.bind((address, port))
    except OSError:
        return False
    return True
