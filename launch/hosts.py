"""The hosts of a run as a user lists them, and which of them this one is."""

from __future__ import annotations

import re
import socket

from infini_train.runtime.errors import UserError


def parse_hosts(text: str) -> list[str]:
    """Names or addresses from a comma-separated list.

    Raises:
        UserError: an empty, malformed or repeated entry.
    """
    hosts = text.split(",")
    for host in hosts:
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:-]*|::[A-Fa-f0-9:]*", host) is None:
            raise UserError(f"--hosts has the entry {host!r}; write names or addresses with commas between, and no ports")
        if hosts.count(host) > 1:
            raise UserError(f"--hosts names {host} twice; name each host once, --processes_per_host says how many run there")
    return hosts


def addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """What a name resolves to on this machine.

    Raises:
        UserError: to nothing.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--hosts: {host!r} has no address here: {error}; give one that every host can reach") from error
    return sorted({(family, str(address[0])) for family, _, _, _, address in found})


def is_own(family: socket.AddressFamily, address: str) -> bool:
    """Whether an address belongs to this machine: only then can a socket be bound to it."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def own_rank(hosts: list[str], node_rank: int | None) -> int:
    """Index of this host in the list.

    Args:
        node_rank: what the user said it is; None finds it by the addresses of this machine.

    Raises:
        UserError: none or several of the hosts are this machine; names what they resolve to.
    """
    resolved = {host: addresses(host) for host in hosts}
    if node_rank is not None:
        if not 0 <= node_rank < len(hosts):
            raise UserError(f"--node_rank is {node_rank}; --hosts names {len(hosts)}, so it is 0 to {len(hosts) - 1}")
        return node_rank
    own = [index for index, host in enumerate(hosts) if any(is_own(*each) for each in resolved[host])]
    if len(own) == 1:
        return own[0]
    tried = "; ".join(f"{host} is {', '.join(address for _, address in found)}" for host, found in resolved.items())
    which = f"several are this machine ({', '.join(hosts[index] for index in own)})" if own else "none is this machine"
    raise UserError(f"--hosts: {which}: {tried}; say which it is with --node_rank, counted from 0")
