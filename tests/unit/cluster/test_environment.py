"""Environment presets: strict file format, and detection of secrets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infini_train.cluster.environment import PRESETS, is_secret, read_environment
from infini_train.runtime.errors import UserError

LAUNCHING = Path(__file__).parents[3] / "docs" / "launching.md"


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.env")))
def test_every_preset_has_the_common_variables_and_only_those_of_its_network(name):
    variables = read_environment(name)
    common = read_environment("single_node")
    assert {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG"} == set(common)
    assert {key: variables[key] for key in common} == common
    assert (name == "efa") == ("FI_PROVIDER" in variables)
    assert (name == "infiniband") == ("NCCL_NET" in variables)
    assert all(f"`{key}`" in LAUNCHING.read_text(encoding="utf-8") for key in variables)


def test_the_list_of_presets():
    assert {path.stem for path in PRESETS.glob("*.env")} == {"single_node", "infiniband", "efa"}


def test_values_are_used_literally(tmp_path):
    lines = [
        "# comment",
        "",
        "  ",
        "A=1",
        "B==mlx5_0,mlx5_1",
        "C=$HOME $(touch canary) `id` # no comment",
        "D=",
        "_e9=a b\\n;'x'y",
    ]
    path = tmp_path / "mine.env"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_environment(str(path)) == {
        "A": "1",
        "B": "=mlx5_0,mlx5_1",
        "C": "$HOME $(touch canary) `id` # no comment",
        "D": "",
        "_e9": "a b\\n;'x'y",
    }


@pytest.mark.parametrize(
    "line,words",
    [
        ("A", "no ="),
        ("hf_abcdefgh", "no ="),
        ("export A=1", "without export"),
        ("A =1", "'A '"),
        (" A=1", "' A'"),
        ("1A=1", "'1A'"),
        ("A-B=1", "'A-B'"),
        ("=1", "not a variable name"),
        ("A= 1", "blanks"),
        ("A=1 ", "blanks"),
        ("A=1\r", "blanks"),
        ("A=a\x1b[2J", "unprintable"),
        ('A="hf_abcdefgh"', "quotes"),
        ("A='hf_abcdefgh", "quotes"),
        ("GOOD=2", "GOOD was set before"),
        ("WANDB_API_KEY=hf_abcdefgh", "WANDB_API_KEY looks like a secret"),
    ],
)
def test_a_malformed_line_is_reported_without_its_value(line, words, tmp_path):
    path = tmp_path / "mine.env"
    path.write_text(f"# head\nGOOD=1\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_environment(str(path))
    message = str(error.value)
    assert f"{path}, line 3" in message and "\n" not in message and "abcdefgh" not in message


def test_the_error_for_an_unknown_preset_lists_the_presets():
    with pytest.raises(UserError, match="'infinband' is unknown; known are efa, infiniband, single_node"):
        read_environment("infinband")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.env", "/"])
def test_the_error_for_an_unreadable_file_names_it(name):
    with pytest.raises(UserError, match="cannot be read") as error:
        read_environment(name)
    assert repr(name.removeprefix("./")) in str(error.value)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "mine.env").write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_environment(str(tmp_path / "mine.env"))


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HFTOKEN",
        "GITHUB_TOKEN_2",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "PGPASSWORD",
        "MYSQL_PWD_PASSWORD",
        "dbPassword",
        "SMTP_PASSWD",
        "KEY_PASSPHRASE",
        "OPENAI_APIKEY",
        "AZURE_STORAGE_KEY",
        "SSH_PRIVATE_KEY",
        "CLIENT_SECRET",
        "SLURM_JWT",
        "GITHUB_PAT",
        "DB_PASS",
        "NEPTUNE_API_TOKEN",
        "comet_api_key",
    ],
)
def test_names_that_suggest_a_secret(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "HF_TOKEN_PATH",
        "AWS_SHARED_CREDENTIALS_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "PATH",
        "HOME",
        "NCCL_IB_PKEY",
        "COMPASS",
        "BYPASS",
        "PYTHONPATH",
        "KEYBOARD",
        "SSH_AUTH_SOCK",
        "PATTERN",
        "MONKEY",
        "NCCL_DEBUG",
        "PASSES",
    ],
)
def test_names_that_do_not_suggest_a_secret(name):
    assert not is_secret(name)
