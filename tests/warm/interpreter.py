"""Which interpreter tests start processes with."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CLIENT = Path(__file__).with_name("client.py")
START_SECONDS = 120.0


def python() -> str:
    """The warm interpreter inside `warm_python`, elsewhere this one."""
    return os.environ.get("WARM_PYTHON", sys.executable)


LAUNCH = """
import os, runpy, sys
sys.executable = os.environ.get("WARM_PYTHON", sys.executable)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launcher(script: Path) -> list[str]:
    """What starts a launcher: a cold interpreter, whose process is the launcher itself, and warm ones for its ranks."""
    return [sys.executable, "-c", LAUNCH, str(script)]


@contextlib.contextmanager
def warm_python() -> Iterator[None]:
    """While this lasts, `python` names an interpreter that forks a process in which the libraries are imported."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        client, address = Path(folder) / "python", Path(folder) / "socket"
        client.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
        client.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm.server", str(address), str(client)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + START_SECONDS
        while not address.exists():
            assert server.poll() is None, f"the warm interpreter ended with {server.returncode} before it began"
            assert time.monotonic() < deadline, "the warm interpreter did not start"
            time.sleep(0.05)
        os.environ.update(WARM_PYTHON=str(client), WARM_PYTHON_SOCKET=str(address))
        try:
            yield
        finally:
            for name in ("WARM_PYTHON", "WARM_PYTHON_SOCKET"):
                del os.environ[name]
            server.terminate()
            server.wait()
