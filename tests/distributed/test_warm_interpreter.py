"""The warm interpreter behaves like a normal one: arguments, files, exit codes, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.warm.interpreter import python, warm_python

LOADED = "import sys; assert 'deepspeed' in sys.modules; "


def call(*arguments: str) -> tuple[int, str, str]:
    result = subprocess.run([python(), *arguments], input="typed", capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "code", ["print(sys.argv[1:], sys.stdin.read())", "sys.exit(3)", "sys.exit('words')", "raise ValueError('words')"]
)
def test_output_and_exit_code_are_those_of_an_interpreter(code):
    expected = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", "a", "b c"], input="typed", capture_output=True, text=True, check=False
    )
    returncode, output, error = call("-c", LOADED + code, "a", "b c")
    assert (returncode, output) == (expected.returncode, expected.stdout)
    assert error.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_scripts_and_modules_import_their_neighbours(tmp_path):
    (tmp_path / "beside.py").write_text("value = 'found'\n")
    (tmp_path / "script.py").write_text("import sys, beside\nif __name__ == '__main__': print(beside.value, sys.argv)\n")
    script = str(tmp_path / "script.py")
    assert call(script, "x") == (0, f"found {[script, 'x']}\n", "")
    result = subprocess.run([python(), "-m", "script", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"found {[script, 'x']}\n", result.stderr


def forked(code: str) -> tuple[subprocess.Popen[str], int]:
    """Start a process; return it and the pid of the forked process behind it."""
    process = subprocess.Popen(
        [python(), "-u", "-c", f"import os, signal, sys, time; print(os.getpid(), flush=True); {code}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


def test_death_by_signal_is_reported_as_such():
    process, _ = forked("os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait(30) == -signal.SIGKILL


def test_signals_are_forwarded():
    # Short sleeps, because Python's handler does not run for a signal that arrives just before a long sleep begins.
    process, pid = forked(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85)); print('armed', flush=True)\nwhile True: time.sleep(0.05)"
    )
    assert process.stdout.readline() == "armed\n" and pid != process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 85


def test_killing_the_client_kills_the_process():
    process, pid = forked("time.sleep(60)")
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_no_process_is_left_at_the_end(monkeypatch):
    for name in ("WARM_PYTHON", "WARM_PYTHON_SOCKET"):  # monkeypatch restores them at the end
        monkeypatch.setenv(name, "")
    with warm_python():
        process, pid = forked("signal.pause()")
    process.wait(30)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
