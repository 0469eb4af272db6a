"""The launchers of all hosts in touch: they start together, learn of each other's failures, and leave with the same exit code.

The first host's launcher listens; the others connect and keep the connection. Messages are JSON objects, one a line. A
connection that breaks tells that a host is gone, also without a word: the system probes it (keep-alive).
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from launch.rank_processes import weight

LOST_EXIT_CODE = 1
"""Exit code of a run that lost a host without being told why."""
RETRY_SECONDS = 0.5
WORD_BYTES = 65536
"""Longer lines come from no launcher."""


class CannotMeet(Exception):
    """The hosts did not come together; the message says which and why."""


class Line:
    """A connection that carries JSON objects."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.open = True
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that lost power or its network is missed after 15 + 6 * 5 seconds.
        for option, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            # Reading finds out that the other side is gone.
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Messages that have come; waits for the first so long. Closes the line if the other side did, or talks nonsense."""
        messages: list[dict[str, Any]] = []
        while self.open and select.select([self.connection], [], [], 0.0 if messages else seconds)[0]:
            try:
                content = self.connection.recv(WORD_BYTES)
            except OSError:
                content = b""
            *lines, self._rest = (self._rest + content).split(b"\n")
            try:
                messages += [dict(json.loads(line)) for line in lines]
            except (ValueError, TypeError):
                content = b""
            if not content or len(self._rest) > WORD_BYTES:
                self.close()
            seconds = 0.0
        return messages

    def close(self) -> None:
        self.open = False
        self.connection.close()


@dataclass
class State:
    """Of one host, or of the job."""

    code: int = 0
    what: str = ""
    ended: bool = False

    def fail(self, code: int, what: str) -> None:
        """The first failure counts, unless a later one explains it: see `weight`."""
        if weight(code) > weight(self.code):
            self.code, self.what = code, what


@dataclass
class Leader:
    """The first host's side."""

    hosts: list[str]
    lines: dict[int, Line]
    """By index of the host."""
    states: dict[int, State] = field(default_factory=dict)
    job: State = field(default_factory=State)

    def start(self, master_port: int) -> int:
        for line in self.lines.values():
            line.send({"start": master_port})
        self.states = {host: State() for host in self.lines}
        return master_port

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        before = (self.job.code, self.job.what, self.job.ended)
        self.job.fail(code, f"{what} on {self.hosts[0]}")
        for host, line in self.lines.items():
            state = self.states[host]
            for message in line.receive():
                self.job.fail(int(message["code"]), f"{message['what']} on {self.hosts[host]}")
                state.ended = bool(message["ended"])
            if not line.open and not state.ended:
                self.job.fail(LOST_EXIT_CODE, f"the launcher on {self.hosts[host]} is gone")
                state.ended = True
        self.job.ended = ended and all(state.ended for state in self.states.values())
        if (self.job.code, self.job.what, self.job.ended) != before:
            for line in self.lines.values():
                if line.open:
                    line.send(vars(self.job))
        return self.job.code, self.job.what, self.job.ended


@dataclass
class Follower:
    """Another host's side."""

    host: str
    leader: str
    line: Line
    told: tuple[int, bool] = (0, False)
    job: State = field(default_factory=State)

    def start(self) -> int:
        """Wait for the leader's word; the port where the ranks meet.

        Raises:
            CannotMeet: it gave up.
        """
        while self.line.open:
            for message in self.line.receive(1.0):
                if "start" in message:
                    return int(message["start"])
                raise CannotMeet(str(message.get("error")))
        raise CannotMeet(f"the launcher on {self.leader} is gone")

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        if (code, ended) != self.told:
            self.line.send({"code": code, "what": what, "ended": ended})
            self.told = (code, ended)
        for message in self.line.receive():
            self.job = State(**message)
        if not self.line.open and not self.job.ended:
            self.job.fail(LOST_EXIT_CODE, f"the launcher on {self.leader} is gone")
            self.job.fail(code, f"{what} on {self.host}")
            self.job.ended = True
        if code and not self.job.code:
            # Not to wait for the leader, whose word on what came first is still to come.
            return code, f"{what} on {self.host}", False
        return self.job.code, self.job.what, self.job.ended


def listen(port: int) -> socket.socket:
    """A listening socket on all of this machine's addresses: its own name may resolve to a loopback address.

    Raises:
        CannotMeet: the port is taken or not allowed.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise CannotMeet(f"port {port} cannot be listened on: {error.strerror}; give another --port on every host") from error


def gather(hosts: list[str], port: int, job: dict[str, Any], seconds: float) -> Leader:
    """Wait on the first host for the launchers of all others.

    Args:
        job: what must be the same on all hosts.

    Raises:
        CannotMeet: naming the hosts that did not come, or one that was started with something else.
    """
    if len(hosts) == 1:
        return Leader(hosts, {})
    lines: dict[int, Line] = {}
    unknown: list[Line] = []
    deadline = time.monotonic() + seconds
    with listen(port) as server:
        while len(lines) < len(hosts) - 1:
            if time.monotonic() > deadline:
                missing = ", ".join(host for index, host in enumerate(hosts) if index and index not in lines)
                _give_up(lines, f"{missing} did not come to {hosts[0]}, port {port}, within {seconds:g} s")
            if select.select([server], [], [], RETRY_SECONDS)[0]:
                connection = server.accept()[0]
                connection.setblocking(True)
                unknown.append(Line(connection))
            for line in unknown:
                for message in line.receive():
                    _join(lines, line, message, hosts, job)
            unknown = [line for line in unknown if line.open and line not in lines.values()]
            for index, line in list(lines.items()):
                line.receive()
                if not line.open:
                    # Stopped while it waited; it may come again.
                    del lines[index]
    return Leader(hosts, lines)


def _join(lines: dict[int, Line], line: Line, message: dict[str, Any], hosts: list[str], job: dict[str, Any]) -> None:
    index, theirs = message.get("node_rank"), message.get("job")
    if not isinstance(index, int) or not 0 < index < len(hosts) or not isinstance(theirs, dict):
        line.close()
        return
    for key, value in job.items():
        if theirs.get(key) != value:
            reason = f"{hosts[index]} was started with {key} {theirs.get(key)!r}, and {hosts[0]} with {value!r}"
            line.send({"error": reason})
            _give_up(lines, reason)
    if index in lines:
        reason = f"two launchers say that they are {hosts[index]}, number {index} of --hosts; see --node_rank"
        line.send({"error": reason})
        _give_up(lines, reason)
    lines[index] = line


def _give_up(lines: dict[int, Line], reason: str) -> None:
    for line in lines.values():
        line.send({"error": reason})
    raise CannotMeet(reason)


def join(hosts: list[str], node_rank: int, port: int, job: dict[str, Any], seconds: float) -> Follower:
    """Connect to the first host's launcher, which may be started later.

    Raises:
        CannotMeet: it does not answer in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((hosts[0], port), timeout=max(1.0, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise CannotMeet(f"{hosts[0]}, port {port}, did not answer within {seconds:g} s: {reason}") from error
            time.sleep(RETRY_SECONDS)
    connection.settimeout(None)
    line = Line(connection)
    line.send({"node_rank": node_rank, "job": job})
    return Follower(hosts[node_rank], hosts[0], line)
