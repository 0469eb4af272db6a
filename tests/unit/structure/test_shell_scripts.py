"""bash and shellcheck accept every shell script of the repository, including the golden job scripts of `submit`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.slurm.requirement import require_programs

ROOT = Path(__file__).parents[3]


def tracked_scripts() -> list[str]:
    """Return the files tracked by git that end in .sh, or that have no suffix and a shell's shebang line."""
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


def test_the_list_has_scripts_with_and_without_suffix():
    assert {".ci/run", "tests/slurm/install.sh"} <= set(SCRIPTS)
    assert any(name.startswith("tests/unit/cluster/golden/") for name in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_parse(script):
    assert complaints(["bash", "-n", script]) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    require_programs("shellcheck")
    assert complaints(["shellcheck", "--severity=style", script]) == ""


def test_bash_and_shellcheck_report_a_mistake(tmp_path):
    """Show that the tests above can fail."""
    require_programs("shellcheck")
    script = tmp_path / "bad.sh"
    script.write_text("#!/bin/bash\nrm $1/*\n")
    assert "SC2086" in complaints(["shellcheck", "--severity=style", str(script)])
    script.write_text("#!/bin/bash\nif true; then\n")
    assert "syntax error" in complaints(["bash", "-n", str(script)])
