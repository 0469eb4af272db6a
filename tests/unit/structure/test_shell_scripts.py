"""Every shell script of the repository, and every job script that `submit` renders, is accepted by bash and shellcheck."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.slurm.requirement import require_programs

ROOT = Path(__file__).parents[3]


def tracked_scripts() -> list[str]:
    """Files that git knows and that end in .sh or begin with a shell's shebang line; the golden job scripts are among them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return [name for name in names if name.endswith(".sh") or (not Path(name).suffix and shebang(ROOT / name))]


def shebang(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(100)
    return first.startswith(b"#!") and first.split()[-1].split(b"/")[-1] in (b"bash", b"sh")


SCRIPTS = tracked_scripts()


def complaints(command: list[str]) -> str:
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout if result.returncode else ""


def test_the_list_holds_what_it_should():
    assert {".ci/run", "tests/slurm/install.sh"} <= set(SCRIPTS)
    assert any(name.startswith("tests/unit/cluster/golden/") for name in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_parse(script):
    assert complaints(["bash", "-n", script]) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    require_programs("shellcheck")
    assert complaints(["shellcheck", "--severity=style", script]) == ""


def test_both_see_a_mistake(tmp_path):
    """The checks above can fail."""
    require_programs("shellcheck")
    script = tmp_path / "bad.sh"
    script.write_text("#!/bin/bash\nrm $1/*\n")
    assert "SC2086" in complaints(["shellcheck", "--severity=style", str(script)])
    script.write_text("#!/bin/bash\nif true; then\n")
    assert "syntax error" in complaints(["bash", "-n", str(script)])
