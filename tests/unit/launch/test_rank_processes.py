"""Which of several failures that a launcher finds at once is the run's."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from launch.rank_processes import RankProcesses

ENDS_AS_ASKED = """
import os, signal, sys
how = sys.argv[1 + int(os.environ["RANK"])]
sys.exit(int(how)) if how.isdigit() else os.kill(os.getpid(), getattr(signal, how))
"""


@pytest.mark.parametrize(
    "ways,code",
    [
        (["1", "SIGKILL"], 137),  # its death ended the other one's communication
        (["1", "SIGSEGV"], 139),
        (["1", "SIGABRT"], 1),  # here it may be the other way round
        (["SIGABRT", "0"], 134),
        (["1", "SIGKILL", "86"], 86),
        (["0", "3"], 3),
        (["0", "0"], 0),
    ],
)
def test_who_was_killed_comes_before_who_lost_its_partner(ways, code):
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(ways))} for rank in range(len(ways))]
    processes = RankProcesses([sys.executable, "-c", ENDS_AS_ASKED, *ways], environments, SimpleNamespace(pass_on=None))
    for rank in processes.ranks:
        rank.wait()  # so that all are found at the first look
    assert processes.wait() == code
