"""Write errors on stdout and stderr do not affect a process; tested in subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINTING = """
import os, sys
from infini_train.runtime.standard_streams import ignore_stream_errors

ignore_stream_errors()
ignore_stream_errors()
for line in range(5000):
    print("a line of a log", line)
    print("a line of a log", line, file=sys.stderr, flush=True)
assert sys.stdout.fileno() == 1 and not sys.stdout.isatty() and sys.stdout.encoding
sys.exit(85)
"""


def test_full_disk_keeps_the_exit_code():
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", PRINTING], stdout=full, stderr=full, check=False).returncode == 85


def test_closed_pipe_keeps_the_exit_code():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert subprocess.run([sys.executable, "-c", PRINTING], stdout=writing, stderr=writing, check=False).returncode == 85
    finally:
        os.close(writing)


def test_closed_streams_keep_the_exit_code():
    command = f'exec "{sys.executable}" -c "$0" >&- 2>&-'
    code = (
        "from infini_train.runtime.standard_streams import ignore_stream_errors; "
        "ignore_stream_errors(); print(1); raise SystemExit(85)"
    )
    assert subprocess.run(["sh", "-c", command, code], check=False).returncode == 85


def test_all_output_is_written():
    result = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, check=False)
    assert result.stdout == result.stderr == "".join(f"a line of a log {line}\n" for line in range(5000))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_printed_in_every_encoding(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "infini_train", "pretrain", "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0 and b"--model.initial_gate" in result.stdout and result.stderr == b""


def test_closed_pipe_ends_a_command_without_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "infini_train", "pretrain", "--print_config"]
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr
