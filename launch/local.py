#!/usr/bin/env python3
"""Run an infini-train command on several processes of this machine.

    python launch/local.py 2 pretrain --config configs/tiny.yaml

Each process gets torch.distributed's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and an
equal share of the CPU cores. Unlike torchrun, the launcher forwards Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP once, waits until the
processes have saved, and exits with their exit code. The caller therefore sees "stopped and resumable" (85), "hung" (86) and
"wrong configuration" (2).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_train.runtime.standard_streams import ignore_stream_errors
from launch.rank_processes import (
    MULTI_PROCESS_COMMANDS,
    RankProcesses,
    check_configuration,
    free_port,
    rank_environments,
    rank_program,
)
from launch.stop_signals import Stopped, StopSignals, print_stopped

USAGE = "usage: launch/local.py NUM_PROCESSES COMMAND [ARGUMENTS]"
EXAMPLE = "python launch/local.py 2 pretrain --config configs/tiny.yaml"
HELP = f"""{USAGE}

Run an infini-train command on several processes of this machine, one for each GPU: {", ".join(MULTI_PROCESS_COMMANDS)}.
COMMAND --help explains a command's arguments. Ctrl-C makes pretrain save a checkpoint and end; the same command resumes it.

example: {EXAMPLE}"""


def main() -> int:
    arguments = sys.argv[1:]
    if not {"-h", "--help"}.isdisjoint(arguments[:2]):
        print(HELP)
        raise SystemExit
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print(f"{USAGE}; see --help", file=sys.stderr)
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
        print_stopped(command[0])
        return stopped.exit_code
    return ranks.wait()


if __name__ == "__main__":
    sys.exit(main())
