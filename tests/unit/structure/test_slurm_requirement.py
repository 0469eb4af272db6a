"""Without SLURM, tests are skipped, or fail if it is required. install.sh reports in one line why it cannot install."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.slurm.requirement import REQUIRE, require_programs

INSTALL = Path(__file__).parents[2] / "slurm" / "install.sh"


def test_a_missing_program_skips_the_test(monkeypatch):
    monkeypatch.delenv(REQUIRE, raising=False)
    require_programs("bash")
    with pytest.raises(pytest.skip.Exception, match=r"no-such-program not installed: run tests/slurm/install\.sh"):
        require_programs("bash", "no-such-program")


def test_a_missing_program_fails_the_test_if_required(monkeypatch):
    monkeypatch.setenv(REQUIRE, "1")
    require_programs("bash")
    # Catch both, because an uncaught skip would skip this test.
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match=r"no-such-program.*SLURM=1 requires it") as raised:
        require_programs("no-such-program")
    assert raised.type is pytest.fail.Exception


def test_install_reports_a_missing_package_manager(tmp_path):
    """Neither `srun` nor `apt-get` is in PATH."""
    for program in ("bash", "id"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    result = subprocess.run([INSTALL], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("install.sh: slurm-wlm ") and result.stderr.count("\n") == 1
    assert "no apt-get" in result.stderr
