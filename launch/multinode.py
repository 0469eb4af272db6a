#!/usr/bin/env python3
"""Run an infini-train command on several hosts without SLURM. Start it once on each host, with the same arguments.

    python launch/multinode.py --hosts hostA,hostB --processes_per_host 8 --preset infiniband pretrain --config configs/8b.yaml

Each launcher finds its host in the list by the addresses of the machine, or by --node_rank. The launchers connect to the
first host, start the ranks together, and exit with the same code: that of the rank that failed first. The command `preflight`
checks the hosts (launch/preflight.py). See docs/launching.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infini_train.cluster.environment import read_environment
from infini_train.runtime.errors import UserError
from infini_train.runtime.standard_streams import ignore_stream_errors
from launch.host_link import ConnectError, Follower, Leader, accept_hosts, join
from launch.hosts import find_node_rank, parse_hosts
from launch.rank_processes import RankProcesses, check_configuration, free_port, rank_environments, rank_program
from launch.stop_signals import Stopped, StopSignals, print_stopped

CONNECT_ERROR_EXIT_CODE = 1
EXAMPLE = "python launch/multinode.py --hosts gpu01,gpu02 --processes_per_host 8 pretrain --config configs/8b.yaml"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run an infini-train command on several hosts. Start this launcher on each host.",
        usage="%(prog)s --hosts A,B --processes_per_host N [options] COMMAND [ARGUMENTS]",
        epilog=f"example: {EXAMPLE}",
        # Do not break lines, so that the example can be copied.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", required=True, help="names or addresses, comma-separated; the first hosts the rendezvous")
    parser.add_argument("--processes_per_host", type=int, required=True, help="one for each GPU")
    parser.add_argument("--port", type=int, default=29400, help="port of the launcher on the first host")
    parser.add_argument(
        "--node_rank", type=int, default=None, help="index of this host in --hosts, from 0; default: found by address"
    )
    parser.add_argument("--preset", default=None, help="preset of launch/environments/ by name, or the path of a file")
    parser.add_argument("--meet_seconds", type=float, default=300.0, help="how long hosts wait for each other at the start")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="pretrain, evaluate, ... or preflight, with its arguments")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is missing, such as pretrain --config FILE")
    if arguments.processes_per_host < 1:
        parser.error(f"--processes_per_host is {arguments.processes_per_host}; it must be at least 1")
    if not 0 < arguments.port < 65536:
        parser.error(f"--port is {arguments.port}; it must be 1 to 65535")
    return arguments


def environment(preset: str | None) -> dict[str, str]:
    """Return the preset's variables, overridden by the environment of this process. Print each override that differs.

    Raises:
        UserError: see `read_environment`.
    """
    variables = read_environment(preset) if preset is not None else {}
    for name, value in variables.items():
        if os.environ.get(name, value) != value:
            print(f"launch: {name} is {os.environ[name]!r}, as set here, and not {value!r} as in {preset}", file=sys.stderr)
    return {**variables, **os.environ}


def connect(hosts: list[str], host: int, arguments: argparse.Namespace) -> tuple[Leader | Follower, int]:
    """Connect to the launchers of the other hosts. Return the connection and the port of the ranks' rendezvous.

    Raises:
        ConnectError: see `accept_hosts`, `join` and `Follower.start`.
    """
    job = {"--hosts": hosts, "--processes_per_host": arguments.processes_per_host, "the command": arguments.command}
    if host == 0:
        leader = accept_hosts(hosts, arguments.port, job, arguments.meet_seconds)
        return leader, leader.start(free_port())
    follower = join(hosts, host, arguments.port, job, arguments.meet_seconds)
    return follower, follower.start()


def start(hosts: list[str], host: int, base: dict[str, str], arguments: argparse.Namespace, stop: StopSignals) -> RankProcesses:
    """Start the ranks of this host at the same time as those of the other hosts."""
    link, port = connect(hosts, host, arguments)
    command = arguments.command
    environments = rank_environments(host, len(hosts), arguments.processes_per_host, hosts[0], port, base)
    return RankProcesses(rank_program(command), environments, stop, link, command[0])


def main() -> int:
    arguments = parse()
    ignore_stream_errors()
    stop = StopSignals()
    try:
        hosts = parse_hosts(arguments.hosts)
        host = find_node_rank(hosts, arguments.node_rank)
        base = environment(arguments.preset)
        code = check_configuration(arguments.command, len(hosts) * arguments.processes_per_host)
        if code is not None:
            return code
        ranks = start(hosts, host, base, arguments, stop)
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return error.exit_code
    except ConnectError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        return CONNECT_ERROR_EXIT_CODE
    except Stopped as stopped:
        print_stopped(arguments.command[0])
        return stopped.exit_code
    return ranks.wait()


if __name__ == "__main__":
    sys.exit(main())
