"""For all tests."""

import signal
import sys

import pytest

# Under nohup it is ignored, by all that tests start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers each time, whichever tests came before it in its process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
