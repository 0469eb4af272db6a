#!/usr/bin/env python3
"""Run an infini-train command on several processes of this machine.

    python launch/local.py 2 pretrain --config configs/tiny.yaml

Each process gets torch.distributed's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and an equal share
of the cores. Unlike torchrun, it passes Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP on once, waits for the processes to save, and
leaves with their own exit code, so that "stopped and resumable" (85), "hangs" (86) and "wrong configuration" (2) reach the
caller.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_train.runtime.standard_streams import ignore_stream_errors
from launch.rank_processes import (
    ON_SEVERAL_PROCESSES,
    RankProcesses,
    check_configuration,
    free_port,
    rank_environments,
    rank_program,
)
from launch.stop_signals import Stopped, StopSignals, say_stopped

USAGE = "usage: launch/local.py NUM_PROCESSES COMMAND [ARGUMENTS]"
EXAMPLE = "python launch/local.py 2 pretrain --config configs/tiny.yaml"
HELP = f"""{USAGE}

Run an infini-train command on several processes of this machine, one for each GPU: {", ".join(ON_SEVERAL_PROCESSES)}.
COMMAND --help explains a command's arguments. Ctrl-C lets pretrain save and end; the same command goes on from there.

example: {EXAMPLE}"""


def main() -> int:
    arguments = sys.argv[1:]
    if not {"-h", "--help"}.isdisjoint(arguments[:2]):
        print(HELP)
        raise SystemExit
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print(f"{USAGE}; --help says more", file=sys.stderr)
        return 2
    ignore_stream_errors()
    stop = StopSignals()
    world_size, command = int(arguments[0]), arguments[1:]
    try:
        code = check_configuration(command, world_size)
        if code is not None:
            return code
        environments = rank_environments(0, 1, world_size, "127.0.0.1", free_port(), dict(os.environ))
        ranks = RankProcesses(rank_program(command), environments, stop, command=command[0])
    except Stopped as stopped:
        say_stopped(command[0])
        return stopped.exit_code
    return ranks.wait()


if __name__ == "__main__":
    sys.exit(main())
