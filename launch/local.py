#!/usr/bin/env python3
"""Run an infini-train command on several processes of this machine.

    python launch/local.py 2 pretrain --config configs/tiny.yaml

Each process gets torch.distributed's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and an equal share
of the cores. Unlike torchrun, it passes Ctrl-C and SIGTERM on once, waits for the processes to save, and leaves with their own
exit code, so that "stopped and resumable" (85), "hangs" (86) and "wrong configuration" (2) reach the caller.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

GRACE_SECONDS = 60.0
"""How long the others may take to end after one process failed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torch.distributed's variables for one process; a thread count that the user set is kept."""
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


HANG_EXIT_CODE = 86
"""The watchdog of a rank found that the job hangs; all ranks that can still run have written their stacks and end."""
HANG_GRACE_SECONDS = 2.0
"""How long the others may take to end then; a stopped rank never does."""


class Processes:
    """The ranks of one run."""

    def __init__(self, world_size: int, command: list[str]) -> None:
        self.stop_requested = False
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        port = free_port()
        # A session of their own: a terminal's Ctrl-C reaches the ranks through this process, once, not twice.
        self.ranks = [
            subprocess.Popen(
                command,
                env=environment(rank, world_size, port),
                start_new_session=True,
            )
            for rank in range(world_size)
        ]

    def wait(self) -> int:
        """Exit code of the run: 0 if every rank ended with 0, else the first code that was not."""
        code, failed_at = 0, 0.0
        while True:
            codes = [rank.poll() for rank in self.ranks]
            failed = [value for value in codes if value]
            if failed and code == 0:
                code, failed_at = failed[0] if failed[0] > 0 else 128 - failed[0], time.monotonic()
                if code not in (2, 85, 87):
                    # The others would wait for the lost rank until a time-out.
                    self._send(signal.SIGTERM)
            if HANG_EXIT_CODE in failed:
                code = HANG_EXIT_CODE
            if None not in codes:
                return code
            if code and time.monotonic() - failed_at > (HANG_GRACE_SECONDS if code == HANG_EXIT_CODE else GRACE_SECONDS):
                self._send(signal.SIGKILL)
            time.sleep(0.05)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.stop_requested:
            self._send(signal.SIGKILL)
            return
        self.stop_requested = True
        print("\nstopping at the end of this step and saving; once more to stop at once", file=sys.stderr)
        self._send(signal.SIGTERM)


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        print("usage: launch/local.py NUM_PROCESSES COMMAND [ARGUMENTS]", file=sys.stderr)
        return 2
    world_size, command = int(arguments[0]), arguments[1:]
    if command[0] == "pretrain":
        # One process says what is wrong with the configuration before any other is started.
        checked = subprocess.run(
            [sys.executable, "-m", "infini_train", *command, "--check_only"],
            env={**os.environ, "WORLD_SIZE": str(world_size)},
        )
        if checked.returncode or "--print_config" in command or "--help" in command:
            return checked.returncode
    return Processes(world_size, [sys.executable, "-m", "infini_train", *command]).wait()


if __name__ == "__main__":
    sys.exit(main())
