"""The exit code of a run when a launcher sees several failures at once."""

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
        (["1", "SIGKILL"], 137),  # its death broke the communication of the other rank
        (["1", "SIGSEGV"], 139),
        (["1", "SIGABRT"], 1),  # a rank may abort because its communication broke
        (["SIGABRT", "0"], 134),
        (["1", "SIGKILL", "86"], 86),
        (["0", "3"], 3),
        (["0", "0"], 0),
    ],
)
def test_a_killed_rank_has_priority_over_a_rank_that_lost_its_peer(ways, code):
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(ways))} for rank in range(len(ways))]
    processes = RankProcesses([sys.executable, "-c", ENDS_AS_ASKED, *ways], environments, SimpleNamespace(forward=None))
    for rank in processes.ranks:
        rank.wait()  # so that the first poll sees all exit codes
    assert processes.wait() == code
