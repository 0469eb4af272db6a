"""The verdict of the preflight: bad nodes, and problems that cannot be attributed to single nodes."""

from __future__ import annotations

from typing import Any

import pytest

from launch.preflight_node import Check, check_folder, check_run_dir, run_with_timeout
from launch.preflight_store import group_by_node
from launch.preflight_verdict import BAD_NODES, GENERAL_PROBLEM, NO_PROBLEM, Node, Verdict, judge, pair_bandwidths, table


def verdict(
    nodes: int = 3,
    *,
    wrong: dict[int, str] | None = None,
    silent: tuple[int, ...] = (),
    measured: dict[int, dict[str, Any]] | None = None,
    offsets: list[float] | None = None,
    pairs: dict[tuple[int, int], float] | None = None,
    all_ranks: float = 1.0,
) -> Verdict:
    """Form the verdict of nodes with two ranks each.

    Args:
        wrong: name of the check that fails, by rank.
        silent: ranks that never answer.
        measured: progress by rank; default: a complete measurement from `offsets`, `pairs` and `all_ranks`.
        offsets: clock offsets in seconds by node.
        pairs: GB/s of pairs of nodes, on a ring.
        all_ranks: GB/s of the all-reduce over all ranks.
    """
    members = [[2 * node, 2 * node + 1] for node in range(nodes)]
    checks = {
        rank: [
            {"name": name, "ok": (wrong or {}).get(rank) != name, "value": f"{name} of {rank}"} for name in ("folder", "gpus")
        ]
        for rank in range(2 * nodes)
        if rank not in silent
    }
    if measured is None:
        partners = {
            node: {other for pair in (pairs or {}) if node in pair for other in pair if other != node} for node in range(nodes)
        }
        measured = {
            rank: {
                "stage": None,
                "offsets": (offsets or [0.0] * nodes) if rank == 0 else None,
                "all_ranks": all_ranks,
                "pairs": {str(o): (pairs or {}).get((node, o), (pairs or {}).get((o, node))) for o in partners[node]},
                "error": None,
            }
            for node, ranks in enumerate(members)
            for rank in ranks
        }
    return judge(
        [Node(f"node{index}", ranks) for index, ranks in enumerate(members)],
        checks,
        None if silent else measured,
        minimum_gigabytes_per_second=0.5,
        maximum_clock_skew_seconds=2.0,
        timeout_seconds=7.0,
    )


def outcome(found: Verdict) -> tuple[int, list[str], int]:
    return found.exit_code, found.bad_nodes, len(found.general)


def test_good_nodes():
    assert outcome(verdict()) == (NO_PROBLEM, [], 0)
    assert verdict().bandwidth == 1.0


def test_a_failed_check_makes_the_node_bad():
    found = verdict(wrong={3: "gpus"})
    assert outcome(found) == (BAD_NODES, ["node1"], 0)
    assert found.nodes[1].problems == {"gpus": "gpus of 3"}


def test_a_check_that_fails_on_every_node_is_a_general_problem():
    found = verdict(wrong={0: "folder", 2: "folder", 5: "folder"})
    assert outcome(found) == (GENERAL_PROBLEM, [], 1) and "folder fails on every node" in found.general[0]
    assert outcome(verdict(1, wrong={0: "folder"})) == (BAD_NODES, ["node0"], 0), "a single node may be the cause"


def test_a_silent_rank_makes_its_node_bad():
    found = verdict(silent=(4,))
    assert outcome(found) == (BAD_NODES, ["node2"], 0)
    assert found.nodes[2].problems["answer"] == "rank 4 did not answer within 7 s"


def test_a_node_without_a_name_cannot_be_excluded():
    found = Verdict([Node("(unknown node of rank 2)", [2], problems={"answer": "none"}), Node("node0", [0])], [])
    assert outcome(found) == (GENERAL_PROBLEM, [], 0)


def test_ranks_that_wait_for_a_silent_rank_are_not_bad():
    stuck = {"stage": "an all-reduce over all ranks", "error": "timed out", "offsets": None, "all_ranks": None, "pairs": {}}
    found = verdict(measured={rank: stuck for rank in range(5)})
    assert outcome(found) == (BAD_NODES, ["node2"], 0)
    found = verdict(measured={rank: stuck for rank in range(6)})
    assert outcome(found) == (GENERAL_PROBLEM, [], 1) and "an all-reduce over all ranks: timed out" in found.general[0]


@pytest.mark.parametrize(
    "offsets,expected",
    [
        ([0.0, 1.9, -0.1], (NO_PROBLEM, [], 0)),
        ([0.0, 0.1, 60.0], (BAD_NODES, ["node2"], 0)),
        ([0.0, 60.0, 60.1], (BAD_NODES, ["node0"], 0)),
        ([0.0, 60.0, 120.0], (GENERAL_PROBLEM, [], 1)),
        ([0.0, 3.0], (GENERAL_PROBLEM, [], 1)),
        ([0.0, 0.1, 60.0, 60.1], (GENERAL_PROBLEM, [], 1)),
        ([0.0, 0.1, 0.2, 60.0, -60.0], (BAD_NODES, ["node3", "node4"], 0)),
    ],
)
def test_clocks_are_compared_with_the_majority(offsets, expected):
    assert outcome(verdict(len(offsets), offsets=offsets)) == expected


@pytest.mark.parametrize(
    "pairs,expected",
    [
        ({(0, 1): 0.1, (1, 2): 1.0, (2, 0): 0.1}, (BAD_NODES, ["node0"], 0)),
        ({(0, 1): 0.1, (1, 2): 0.1, (2, 0): 0.1}, (GENERAL_PROBLEM, [], 1)),
        ({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}, (GENERAL_PROBLEM, [], 1)),
        ({(0, 1): 0.1}, (GENERAL_PROBLEM, [], 1)),
        ({(0, 1): 0.1, (1, 2): 0.1, (2, 3): 1.0, (3, 4): 1.0, (4, 0): 1.0}, (BAD_NODES, ["node1"], 0)),
    ],
)
def test_a_slow_node_is_slow_with_every_partner(pairs, expected):
    found = verdict(len({node for pair in pairs for node in pair}), pairs=pairs, all_ranks=0.1)
    assert outcome(found) == expected
    assert outcome(verdict(3, pairs=None, all_ranks=0.6)) == (NO_PROBLEM, [], 0)


def test_an_interrupted_rank_does_not_make_a_pair_slow():
    nodes = [Node(name, [rank]) for rank, name in enumerate("ab")]
    assert pair_bandwidths(nodes, {0: {"pairs": {"1": 0.1}}, 1: {"pairs": {"0": 0.9}}}) == {0: {1: 0.9}, 1: {0: 0.9}}


def test_the_table_names_the_problems():
    lines = table(verdict(wrong={3: "gpus"}, offsets=[0.0, 0.5, 0.0])).splitlines()
    assert lines[0].split() == ["node", "ranks", "folder", "gpus", "clock", "verdict"]
    assert lines[2].split("  ")[0] == "node1" and lines[2].endswith("BAD: gpus: gpus of 3") and "+0.500 s" in lines[2]
    assert lines[3].endswith("fine") and lines[4] == "all-reduce over all ranks: 1.00 GB/s"


def test_pairs_are_disjoint_in_a_round_and_each_node_has_two_partners():
    from launch.preflight_bandwidth import node_pairs

    assert node_pairs(1) == [] and node_pairs(2) == [[(0, 1)]]
    for nodes in range(3, 12):
        rounds = node_pairs(nodes)
        for pairs in rounds:
            members = [node for pair in pairs for node in pair]
            assert len(members) == len(set(members))
        met = [node for pairs in rounds for pair in pairs for node in pair]
        assert all(met.count(node) == 2 for node in range(nodes))
        assert len({frozenset(pair) for pairs in rounds for pair in pairs}) == nodes


def test_ranks_without_a_node_name_get_that_of_their_block(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    names = {0: "a", 1: "a", 2: "b"}
    assert group_by_node(names, 4, 2) == [("a", [0, 1]), ("b", [2, 3])]
    assert group_by_node({0: "a", 1: "a"}, 4, 2) == [
        ("a", [0, 1]),
        ("(unknown node of rank 2)", [2]),
        ("(unknown node of rank 3)", [3]),
    ]


def test_a_check_that_hangs_or_raises_fails():
    import threading

    assert run_with_timeout(0.05, "name", lambda: str(threading.Event().wait(5.0))) == Check(
        "name", False, "not finished in 0 s"
    )
    assert run_with_timeout(5.0, "name", lambda: str(1 // 0)) == Check("name", False, "integer division or modulo by zero")
    assert run_with_timeout(5.0, "name", lambda: "found") == Check("name", True, "found")


def test_a_folder_is_written_read_and_cleaned(tmp_path):
    assert "GiB free" in check_folder(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [], "the test file was not deleted"
    with pytest.raises(OSError, match="less than"):
        check_folder(tmp_path, 2**60)
    with pytest.raises(OSError):
        check_folder(tmp_path / "missing", 1)
    assert "GiB free" in check_run_dir(tmp_path / "run" / "new")


def test_the_run_directory_needs_space_for_the_next_checkpoint(tmp_path):
    shard = tmp_path / "checkpoints" / "step_00000004" / "shard"
    shard.parent.mkdir(parents=True)
    with shard.open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(OSError, match=r"less than the 8192\.0"):
        check_run_dir(tmp_path)
