"""Parse the list of hosts of a run, and find this machine in it."""

from __future__ import annotations

import re
import socket

from infini_train.runtime.errors import UserError


def parse_hosts(text: str) -> list[str]:
    """Split a comma-separated list into host names or addresses.

    Raises:
        UserError: an entry is empty, malformed or repeated.
    """
    hosts = text.split(",")
    for host in hosts:
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:-]*|::[A-Fa-f0-9:]*", host) is None:
            raise UserError(f"--hosts has the entry {host!r}; write names or addresses separated by commas, without ports")
        if hosts.count(host) > 1:
            raise UserError(f"--hosts names {host} twice; name each host once, and set --processes_per_host")
    return hosts


def addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Resolve a host name on this machine.

    Raises:
        UserError: the name has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--hosts: {host!r} has no address here: {error}; give one that every host can reach") from error
    return sorted({(family, str(address[0])) for family, _, _, _, address in found})


def is_local_address(family: socket.AddressFamily, address: str) -> bool:
    """Return whether an address belongs to this machine. A socket can be bound only to such an address."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def find_node_rank(hosts: list[str], node_rank: int | None) -> int:
    """Return the index of this machine in the list of hosts.

    Args:
        node_rank: index that the user gave; None finds it by the addresses of this machine.

    Raises:
        UserError: none or several of the hosts are this machine. The message lists the addresses of all hosts.
    """
    resolved = {host: addresses(host) for host in hosts}
    if node_rank is not None:
        if not 0 <= node_rank < len(hosts):
            raise UserError(f"--node_rank is {node_rank}; --hosts names {len(hosts)}, so it must be 0 to {len(hosts) - 1}")
        return node_rank
    own = [index for index, host in enumerate(hosts) if any(is_local_address(*each) for each in resolved[host])]
    if len(own) == 1:
        return own[0]
    resolutions = "; ".join(f"{host} is {', '.join(address for _, address in found)}" for host, found in resolved.items())
    found_hosts = f"several are this machine ({', '.join(hosts[index] for index in own)})" if own else "none is this machine"
    raise UserError(f"--hosts: {found_hosts}: {resolutions}; give the index of this host with --node_rank, counted from 0")
