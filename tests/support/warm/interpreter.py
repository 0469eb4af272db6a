"""The interpreter with which tests start processes."""

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
    """Return the path of the warm interpreter inside `warm_python`, else of the current one."""
    return os.environ.get("WARM_PYTHON", sys.executable)


LAUNCH = """
import os, runpy, sys
sys.executable = os.environ.get("WARM_PYTHON", sys.executable)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launcher(script: Path) -> list[str]:
    """Return the command that starts a launcher.

    The launcher runs in a normal interpreter, so that its pid is the launcher's; its ranks run in warm ones.
    """
    return [sys.executable, "-c", LAUNCH, str(script)]


@contextlib.contextmanager
def warm_python() -> Iterator[None]:
    """Context manager in which `python` names an interpreter that forks a process with the libraries already imported."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        client, address = Path(folder) / "python", Path(folder) / "socket"
        client.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
        client.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm.server", str(address), str(client)],
            cwd=Path(__file__).parents[3],
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
