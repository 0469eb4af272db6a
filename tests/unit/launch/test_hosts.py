"""The list of hosts, the environment of ranks, and the connection between launchers."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from infini_train.runtime.errors import UserError
from launch.host_link import ConnectError, Connection, Follower, Leader, accept_hosts, join
from launch.hosts import find_node_rank, parse_hosts
from launch.rank_processes import rank_environments
from tests.support.free_port import free_port


@pytest.mark.parametrize("text", ["", "a,", "a,,b", "a b", "-a", "a;b", "a,a", "user@a", "[::1]"])
def test_malformed_host_lists_are_refused(text):
    with pytest.raises(UserError, match="--hosts"):
        parse_hosts(text)


def test_host_lists_accept_names_and_addresses():
    assert parse_hosts("gpu-01.site,10.0.0.2,::1,fd00::2") == ["gpu-01.site", "10.0.0.2", "::1", "fd00::2"]


def test_a_host_finds_itself_by_its_addresses():
    # 198.51.100.0/24 is reserved for documentation, so no machine has such an address.
    assert find_node_rank(["198.51.100.1", "127.0.0.1"], None) == 1
    with pytest.raises(UserError, match=r"none is this machine: 198.51.100.1 is 198.51.100.1; .*--node_rank"):
        find_node_rank(["198.51.100.1", "198.51.100.2"], None)
    with pytest.raises(UserError, match=r"several are this machine \(127.0.0.1, 127.0.0.2\)"):
        find_node_rank(["127.0.0.1", "127.0.0.2", "198.51.100.1"], None)


def test_node_rank_selects_the_host():
    assert find_node_rank(["127.0.0.1", "127.0.0.2"], 1) == 1
    for wrong in (-1, 2):
        with pytest.raises(UserError, match=f"--node_rank is {wrong}"):
            find_node_rank(["127.0.0.1", "127.0.0.2"], wrong)


def test_ranks_are_numbered_across_hosts():
    environments = rank_environments(1, 3, 2, "hostA", 4711, {"OMP_NUM_THREADS": "5", "RANK": "9", "A": "b"})
    assert [each["RANK"] for each in environments] == ["2", "3"]
    assert [each["LOCAL_RANK"] for each in environments] == ["0", "1"]
    for each in environments:
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) == ("6", "2")
        assert (each["MASTER_ADDR"], each["MASTER_PORT"], each["OMP_NUM_THREADS"], each["A"]) == ("hostA", "4711", "5", "b")
    assert int(rank_environments(0, 1, 10_000, "hostA", 1, {})[0]["OMP_NUM_THREADS"]) == 1


def meet(hosts: int = 3) -> tuple[Leader, list[Follower]]:
    """Connect the launchers of several hosts, all on this machine."""
    names = ["127.0.0.1", *(f"host{index}" for index in range(1, hosts))]
    port = free_port()
    followers: dict[int, Follower] = {}

    def follow(index: int) -> None:
        followers[index] = join(names, index, port, {"job": 1}, 10.0)

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(1, hosts)]
    for thread in threads:
        thread.start()
    leader = accept_hosts(names, port, {"job": 1}, 10.0)
    leader.start(4711)
    for thread in threads:
        thread.join()
    ordered = [followers[index] for index in range(1, hosts)]
    assert [follower.start() for follower in ordered] == [4711] * (hosts - 1)
    return leader, ordered


def settle(sides: list[Leader | Follower], states: list[tuple[int, str, bool]]) -> list[tuple[int, str, bool]]:
    """Exchange states until messages have arrived, and return the result on each side."""
    for _ in range(5):
        known = [side.exchange(*state) for side, state in zip(sides, states, strict=True)]
        time.sleep(0.02)
    return known


def test_the_job_ends_when_all_hosts_have():
    leader, followers = meet()
    sides = [leader, *followers]
    assert settle(sides, [(0, "", True), (0, "", False), (0, "", True)]) == [(0, "", False)] * 3
    assert settle(sides, [(0, "", True)] * 3) == [(0, "", True)] * 3


def test_all_hosts_return_the_exit_code_of_the_first_failure():
    leader, followers = meet()
    sides = [leader, *followers]
    first = (137, "rank 5 was killed by signal 9 on host2", False)
    assert settle(sides, [(0, "", False), (0, "", False), (137, "rank 5 was killed by signal 9", False)]) == [first] * 3
    # The other ranks fail as a consequence.
    states = [(1, "rank 0 ended with exit code 1", True), (1, "rank 1 ended with exit code 1", True)]
    known = settle(sides, [*states, (137, "rank 5 was killed by signal 9", True)])
    assert known == [(137, "rank 5 was killed by signal 9 on host2", True)] * 3


def test_a_hang_replaces_an_earlier_failure():
    leader, followers = meet()
    states = [(1, "rank 0 ended with exit code 1", True), (86, "rank 1 ended with exit code 86", True), (0, "", True)]
    assert settle([leader, *followers], states) == [(86, "rank 1 ended with exit code 86 on host1", True)] * 3


def test_a_lost_host_is_a_failure():
    leader, followers = meet()
    followers[1].connection.close()
    known = settle([leader, followers[0]], [(0, "", False), (0, "", False)])
    assert known == [(1, "the launcher on host2 is gone", False)] * 2
    for connection in leader.connections.values():
        connection.close()
    code, what, ended = settle([followers[0]], [(0, "", True)])[0]
    assert (code, ended) == (1, True) and what == "the launcher on host2 is gone"


def test_connections_of_other_programs_are_rejected():
    port = free_port()
    gathered: list[object] = []

    def lead() -> None:
        try:
            gathered.append(accept_hosts(["127.0.0.1", "host1"], port, {"job": 1}, 3.0))
        except ConnectError as error:
            gathered.append(str(error))

    thread = threading.Thread(target=lead)
    thread.start()
    time.sleep(0.3)
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"node_rank": 0, "job": {}}\n',
        b'{"node_rank": "1", "job": 2}\n',
        b"x" * 10**5,
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(words)
            time.sleep(0.1)
    thread.join()
    assert gathered == [f"host1 did not connect to 127.0.0.1, port {port}, within 3 s"]


def test_messages_may_arrive_in_fragments():
    here, there = socket.socketpair()
    connection = Connection.__new__(Connection)
    connection.socket, connection.open, connection._rest = here, True, b""
    there.sendall(b'{"a": 1}\n{"b"')
    assert connection.receive(1.0) == [{"a": 1}]
    there.sendall(b": 2}\n")
    assert connection.receive(1.0) == [{"b": 2}]
    there.close()
    assert connection.receive(1.0) == [] and not connection.open
