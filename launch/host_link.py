"""Connection between the launchers of all hosts: common start, shared failures, and a common exit code.

The launcher of the first host (the leader) listens. The launchers of the other hosts (the followers) connect and keep the
connection open. Each message is a JSON object on one line. A broken connection means that a host is lost. TCP keep-alive
detects a host that disappears without closing its connection.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from launch.rank_processes import failure_priority

LOST_EXIT_CODE = 1
"""Exit code of a run that lost a host for an unknown reason."""
RETRY_SECONDS = 0.5
"""Seconds between attempts to connect, and the longest wait for a new connection before the deadline is checked."""
MAXIMUM_MESSAGE_BYTES = 65536
"""Maximum bytes of a message, and of one read. A longer line does not come from a launcher."""


class ConnectError(Exception):
    """The launchers could not connect to each other. The message names the hosts and the reason."""


class Connection:
    """A socket that sends and receives JSON objects, one per line."""

    def __init__(self, peer: socket.socket) -> None:
        self.socket = peer
        self.open = True
        self._rest = b""
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Detect a host that lost power or its network after 15 + 6 * 5 seconds.
        for option, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            # `receive` detects that the peer has closed the connection.
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Return the received messages; wait up to `seconds` for the first. Close on end of file or on a malformed message."""
        messages: list[dict[str, Any]] = []
        while self.open and select.select([self.socket], [], [], 0.0 if messages else seconds)[0]:
            try:
                content = self.socket.recv(MAXIMUM_MESSAGE_BYTES)
            except OSError:
                content = b""
            *lines, self._rest = (self._rest + content).split(b"\n")
            try:
                messages += [dict(json.loads(line)) for line in lines]
            except (ValueError, TypeError):
                content = b""
            if not content or len(self._rest) > MAXIMUM_MESSAGE_BYTES:
                self.close()
            seconds = 0.0
        return messages

    def close(self) -> None:
        self.open = False
        self.socket.close()


@dataclass
class State:
    """The state of one host or of the whole job."""

    code: int = 0
    """Exit code of the failure; 0 without one."""
    what: str = ""
    """Description of the failure."""
    ended: bool = False
    """Whether all processes have ended."""

    def fail(self, code: int, what: str) -> None:
        """Record a failure. Keep the first one unless the new one has a higher priority: see `failure_priority`."""
        if failure_priority(code) > failure_priority(self.code):
            self.code, self.what = code, what


@dataclass
class Leader:
    """The connections of the first host's launcher to all others."""

    hosts: list[str]
    connections: dict[int, Connection]
    """Connections by index of the host."""
    states: dict[int, State] = field(default_factory=dict)
    job: State = field(default_factory=State)

    def start(self, master_port: int) -> int:
        for connection in self.connections.values():
            connection.send({"start": master_port})
        self.states = {host: State() for host in self.connections}
        return master_port

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        before = (self.job.code, self.job.what, self.job.ended)
        self.job.fail(code, f"{what} on {self.hosts[0]}")
        for host, connection in self.connections.items():
            state = self.states[host]
            for message in connection.receive():
                self.job.fail(int(message["code"]), f"{message['what']} on {self.hosts[host]}")
                state.ended = bool(message["ended"])
            if not connection.open and not state.ended:
                self.job.fail(LOST_EXIT_CODE, f"the launcher on {self.hosts[host]} is gone")
                state.ended = True
        self.job.ended = ended and all(state.ended for state in self.states.values())
        if (self.job.code, self.job.what, self.job.ended) != before:
            for connection in self.connections.values():
                if connection.open:
                    connection.send(vars(self.job))
        return self.job.code, self.job.what, self.job.ended


@dataclass
class Follower:
    """The connection of another host's launcher to the first host."""

    host: str
    leader: str
    connection: Connection
    told: tuple[int, bool] = (0, False)
    job: State = field(default_factory=State)

    def start(self) -> int:
        """Wait for the leader's start message, and return the port of the ranks' rendezvous.

        Raises:
            ConnectError: the leader reported an error or closed the connection.
        """
        while self.connection.open:
            for message in self.connection.receive(1.0):
                if "start" in message:
                    return int(message["start"])
                raise ConnectError(str(message.get("error")))
        raise ConnectError(f"the launcher on {self.leader} is gone")

    def exchange(self, code: int, what: str, ended: bool) -> tuple[int, str, bool]:
        if (code, ended) != self.told:
            self.connection.send({"code": code, "what": what, "ended": ended})
            self.told = (code, ended)
        for message in self.connection.receive():
            self.job = State(**message)
        if not self.connection.open and not self.job.ended:
            self.job.fail(LOST_EXIT_CODE, f"the launcher on {self.leader} is gone")
            self.job.fail(code, f"{what} on {self.host}")
            self.job.ended = True
        if code and not self.job.code:
            # Do not wait until the leader decides which failure was first.
            return code, f"{what} on {self.host}", False
        return self.job.code, self.job.what, self.job.ended


def listen(port: int) -> socket.socket:
    """Open a listening socket on all addresses of this machine, because its own name may resolve to a loopback address.

    Raises:
        ConnectError: the port is in use or not permitted.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ConnectError(f"cannot listen on port {port}: {error.strerror}; give another --port on every host") from error


def accept_hosts(hosts: list[str], port: int, job: dict[str, Any], seconds: float) -> Leader:
    """Wait on the first host until the launchers of all other hosts have connected.

    Args:
        job: settings that must be the same on all hosts.
        seconds: time limit.

    Raises:
        ConnectError: some hosts did not connect in time, or one was started with other settings. The message names them.
    """
    if len(hosts) == 1:
        return Leader(hosts, {})
    connections: dict[int, Connection] = {}
    unidentified: list[Connection] = []
    deadline = time.monotonic() + seconds
    with listen(port) as server:
        while len(connections) < len(hosts) - 1:
            if time.monotonic() > deadline:
                missing = ", ".join(host for index, host in enumerate(hosts) if index and index not in connections)
                _abort(connections, f"{missing} did not connect to {hosts[0]}, port {port}, within {seconds:g} s")
            if select.select([server], [], [], RETRY_SECONDS)[0]:
                accepted = server.accept()[0]
                accepted.setblocking(True)
                unidentified.append(Connection(accepted))
            for connection in unidentified:
                for message in connection.receive():
                    _join(connections, connection, message, hosts, job)
            unidentified = [
                connection for connection in unidentified if connection.open and connection not in connections.values()
            ]
            for index, connection in list(connections.items()):
                connection.receive()
                if not connection.open:
                    # The launcher was stopped while it waited. It may connect again.
                    del connections[index]
    return Leader(hosts, connections)


def _join(
    connections: dict[int, Connection], connection: Connection, message: dict[str, Any], hosts: list[str], job: dict[str, Any]
) -> None:
    index, theirs = message.get("node_rank"), message.get("job")
    if not isinstance(index, int) or not 0 < index < len(hosts) or not isinstance(theirs, dict):
        connection.close()
        return
    for key, value in job.items():
        if theirs.get(key) != value:
            reason = f"{hosts[index]} was started with {key} {theirs.get(key)!r}, and {hosts[0]} with {value!r}"
            connection.send({"error": reason})
            _abort(connections, reason)
    if index in connections:
        reason = f"two launchers are started as {hosts[index]}, number {index} of --hosts; check --node_rank"
        connection.send({"error": reason})
        _abort(connections, reason)
    connections[index] = connection


def _abort(connections: dict[int, Connection], reason: str) -> None:
    for connection in connections.values():
        connection.send({"error": reason})
    raise ConnectError(reason)


def join(hosts: list[str], node_rank: int, port: int, job: dict[str, Any], seconds: float) -> Follower:
    """Connect to the first host's launcher. Retry, because it may be started later.

    Raises:
        ConnectError: the launcher does not answer in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            peer = socket.create_connection((hosts[0], port), timeout=max(1.0, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise ConnectError(f"{hosts[0]}, port {port}, did not answer within {seconds:g} s: {reason}") from error
            time.sleep(RETRY_SECONDS)
    peer.settimeout(None)
    connection = Connection(peer)
    connection.send({"node_rank": node_rank, "job": job})
    return Follower(hosts[node_rank], hosts[0], connection)
