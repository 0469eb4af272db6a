"""Command line entry point: parse the arguments, run the command, and report user errors."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import NoReturn

from infini_train.cli.parser import COMMAND_MODULES, parse
from infini_train.runtime.errors import AgreedError, UserError
from infini_train.runtime.standard_streams import replace_unencodable_characters


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None reads `sys.argv`.

    Returns:
        The exit code:

        - 0: success.
        - 1: `checkpoint verify` found damage, or `plan --dry_run` found a difference.
        - 2: a user error, reported in one line.
        - 85: the run stopped early and can be resumed.
        - 87: the run stopped itself because training is unhealthy, reported in one line.
        - 130: Ctrl-C while there was nothing to save.
    """
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        section = arguments[arguments.command]
        return COMMAND_MODULES[arguments.command].run_command(section)
    except UserError as error:
        _report_error(error)
        if not isinstance(error, AgreedError) and _has_peer_ranks():
            _exit_immediately(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        print("infini-train: interrupted", file=sys.stderr)
        return 130


def run_and_exit() -> NoReturn:
    """Run `main` and exit the process with its exit code."""
    replace_unencodable_characters()
    try:
        code = main()
    except BrokenPipeError:
        if _has_peer_ranks():
            _exit_immediately(1)
        code = 128 + signal.SIGPIPE  # the reader of stdout closed the pipe
    except Exception:
        if not _has_peer_ranks():
            raise
        sys.excepthook(*sys.exc_info())
        _exit_immediately(1)
    # The work is complete, so ignore SIGTERM: a launcher treats a rank killed by SIGTERM as one that never started.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def _has_peer_ranks() -> bool:
    """Return whether this process is in a process group with other ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def _exit_immediately(code: int) -> NoReturn:
    """Exit without cleaning up the process groups.

    A clean NCCL shutdown waits for the other ranks, which wait for this rank in a collective: a deadlock.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_error(error: UserError) -> None:
    """Print the error on rank 0, and on the first rank of every other node.

    Errors that all ranks agreed on are printed by rank 0 only. Other errors may concern a single node.
    """
    if (rank := os.environ.get("RANK", "0")) == "0":
        print(f"infini-train: error: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0" and not isinstance(error, AgreedError):
        print(f"infini-train: error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_and_exit()
