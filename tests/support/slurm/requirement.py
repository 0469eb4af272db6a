"""Skip tests whose programs are not installed, or fail them where CI requires the programs."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

REQUIRE = "INFINI_TRAIN_REQUIRE_SLURM"
# Debian installs daemons in sbin folders, which are not in every user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it if INFINI_TRAIN_REQUIRE_SLURM=1."""
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{reason}; {REQUIRE}=1 requires it", pytrace=False)
    pytest.skip(reason)


def require_programs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        unavailable(f"{', '.join(missing)} not installed: run tests/slurm/install.sh")
