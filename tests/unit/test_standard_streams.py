"""Words that cannot be written cost a run nothing, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TALKS = """
import os, sys
from infini_train.standard_streams import ignore_stream_errors

ignore_stream_errors()
ignore_stream_errors()
for line in range(5000):
    print("a line of a log", line)
    print("a line of a log", line, file=sys.stderr, flush=True)
assert sys.stdout.fileno() == 1 and not sys.stdout.isatty() and sys.stdout.encoding
sys.exit(85)
"""


def test_a_full_disk_leaves_the_exit_code_alone():
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", TALKS], stdout=full, stderr=full, check=False).returncode == 85


def test_a_reader_that_is_gone_leaves_the_exit_code_alone():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert subprocess.run([sys.executable, "-c", TALKS], stdout=writing, stderr=writing, check=False).returncode == 85
    finally:
        os.close(writing)


def test_closed_streams_leave_the_exit_code_alone():
    command = f'exec "{sys.executable}" -c "$0" >&- 2>&-'
    code = (
        "from infini_train.standard_streams import ignore_stream_errors; ignore_stream_errors(); print(1); raise SystemExit(85)"
    )
    assert subprocess.run(["sh", "-c", command, code], check=False).returncode == 85


def test_what_can_be_written_is():
    result = subprocess.run([sys.executable, "-c", TALKS], capture_output=True, text=True, check=False)
    assert result.stdout == result.stderr == "".join(f"a line of a log {line}\n" for line in range(5000))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_printed_in_every_encoding(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "infini_train", "pretrain", "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0 and b"--model.initial_gate" in result.stdout and result.stderr == b""


def test_a_reader_that_has_read_enough_ends_a_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "infini_train", "pretrain", "--print_config"]
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr
