"""Which of the listed hosts this one is, the environment of ranks, and what launchers tell each other."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from infini_train.runtime.errors import UserError
from launch.host_link import CannotMeet, Follower, Leader, Line, gather, join
from launch.hosts import own_rank, parse_hosts
from launch.rank_processes import rank_environments
from tests.support.free_port import free_port


@pytest.mark.parametrize("text", ["", "a,", "a,,b", "a b", "-a", "a;b", "a,a", "user@a", "[::1]"])
def test_malformed_lists_are_refused(text):
    with pytest.raises(UserError, match="--hosts"):
        parse_hosts(text)


def test_lists_hold_names_and_addresses():
    assert parse_hosts("gpu-01.site,10.0.0.2,::1,fd00::2") == ["gpu-01.site", "10.0.0.2", "::1", "fd00::2"]


def test_a_host_finds_itself_by_its_addresses():
    # 198.51.100.0/24 is reserved for documentation: nobody's.
    assert own_rank(["198.51.100.1", "127.0.0.1"], None) == 1
    with pytest.raises(UserError, match=r"none is this machine: 198.51.100.1 is 198.51.100.1; .*--node_rank"):
        own_rank(["198.51.100.1", "198.51.100.2"], None)
    with pytest.raises(UserError, match=r"several are this machine \(127.0.0.1, 127.0.0.2\)"):
        own_rank(["127.0.0.1", "127.0.0.2", "198.51.100.1"], None)


def test_the_user_decides_which_host_it_is():
    assert own_rank(["127.0.0.1", "127.0.0.2"], 1) == 1
    for wrong in (-1, 2):
        with pytest.raises(UserError, match=f"--node_rank is {wrong}"):
            own_rank(["127.0.0.1", "127.0.0.2"], wrong)


def test_ranks_are_numbered_through_all_hosts():
    environments = rank_environments(1, 3, 2, "hostA", 4711, {"OMP_NUM_THREADS": "5", "RANK": "9", "A": "b"})
    assert [each["RANK"] for each in environments] == ["2", "3"]
    assert [each["LOCAL_RANK"] for each in environments] == ["0", "1"]
    for each in environments:
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) == ("6", "2")
        assert (each["MASTER_ADDR"], each["MASTER_PORT"], each["OMP_NUM_THREADS"], each["A"]) == ("hostA", "4711", "5", "b")
    assert int(rank_environments(0, 1, 10_000, "hostA", 1, {})[0]["OMP_NUM_THREADS"]) == 1


def meet(hosts: int = 3) -> tuple[Leader, list[Follower]]:
    """Launchers of some hosts on this machine, in touch."""
    names = ["127.0.0.1", *(f"host{index}" for index in range(1, hosts))]
    port = free_port()
    followers: dict[int, Follower] = {}

    def follow(index: int) -> None:
        followers[index] = join(names, index, port, {"job": 1}, 10.0)

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(1, hosts)]
    for thread in threads:
        thread.start()
    leader = gather(names, port, {"job": 1}, 10.0)
    leader.start(4711)
    for thread in threads:
        thread.join()
    ordered = [followers[index] for index in range(1, hosts)]
    assert [follower.start() for follower in ordered] == [4711] * (hosts - 1)
    return leader, ordered


def settle(sides: list[Leader | Follower], states: list[tuple[int, str, bool]]) -> list[tuple[int, str, bool]]:
    """What each side knows after messages had time to travel."""
    for _ in range(5):
        known = [side.exchange(*state) for side, state in zip(sides, states, strict=True)]
        time.sleep(0.02)
    return known


def test_the_job_ends_when_all_hosts_have():
    leader, followers = meet()
    sides = [leader, *followers]
    assert settle(sides, [(0, "", True), (0, "", False), (0, "", True)]) == [(0, "", False)] * 3
    assert settle(sides, [(0, "", True)] * 3) == [(0, "", True)] * 3


def test_all_hosts_learn_of_the_first_failure_and_leave_with_its_code():
    leader, followers = meet()
    sides = [leader, *followers]
    first = (137, "rank 5 was killed by signal 9 on host2", False)
    assert settle(sides, [(0, "", False), (0, "", False), (137, "rank 5 was killed by signal 9", False)]) == [first] * 3
    # Others fail in consequence.
    states = [(1, "rank 0 ended with exit code 1", True), (1, "rank 1 ended with exit code 1", True)]
    known = settle(sides, [*states, (137, "rank 5 was killed by signal 9", True)])
    assert known == [(137, "rank 5 was killed by signal 9 on host2", True)] * 3


def test_a_hang_outweighs_what_came_before():
    leader, followers = meet()
    states = [(1, "rank 0 ended with exit code 1", True), (86, "rank 1 ended with exit code 86", True), (0, "", True)]
    assert settle([leader, *followers], states) == [(86, "rank 1 ended with exit code 86 on host1", True)] * 3


def test_a_host_that_is_gone_is_a_failure():
    leader, followers = meet()
    followers[1].line.close()
    known = settle([leader, followers[0]], [(0, "", False), (0, "", False)])
    assert known == [(1, "the launcher on host2 is gone", False)] * 2
    for line in leader.lines.values():
        line.close()
    code, what, ended = settle([followers[0]], [(0, "", True)])[0]
    assert (code, ended) == (1, True) and what == "the launcher on host2 is gone"


def test_strangers_do_not_join():
    port = free_port()
    gathered: list[object] = []

    def lead() -> None:
        try:
            gathered.append(gather(["127.0.0.1", "host1"], port, {"job": 1}, 3.0))
        except CannotMeet as error:
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
    assert gathered == [f"host1 did not come to 127.0.0.1, port {port}, within 3 s"]


def test_messages_may_come_in_pieces():
    here, there = socket.socketpair()
    line = Line.__new__(Line)
    line.connection, line.open, line._rest = here, True, b""
    there.sendall(b'{"a": 1}\n{"b"')
    assert line.receive(1.0) == [{"a": 1}]
    there.sendall(b": 2}\n")
    assert line.receive(1.0) == [{"b": 2}]
    there.close()
    assert line.receive(1.0) == [] and not line.open
