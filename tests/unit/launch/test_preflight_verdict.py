"""From reports to a verdict: which node is bad, and when no node is."""

from __future__ import annotations

from typing import Any

import pytest

from launch.preflight_node import Check, check_folder, check_run_dir, within
from launch.preflight_store import group_by_node
from launch.preflight_verdict import BAD_NODES, FINE, NO_NODE_TO_BLAME, Node, Verdict, judge, pair_bandwidths, table


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
    """With two ranks a node.

    Args:
        wrong: a check that fails, by rank.
        silent: ranks that never answer.
        pairs: GB/s of pairs of nodes, on a ring.
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
    assert outcome(verdict()) == (FINE, [], 0)
    assert verdict().bandwidth == 1.0


def test_a_rank_that_finds_something_wrong_makes_its_node_bad():
    found = verdict(wrong={3: "gpus"})
    assert outcome(found) == (BAD_NODES, ["node1"], 0)
    assert found.nodes[1].problems == {"gpus": "gpus of 3"}


def test_what_fails_everywhere_is_nobodys_fault():
    found = verdict(wrong={0: "folder", 2: "folder", 5: "folder"})
    assert outcome(found) == (NO_NODE_TO_BLAME, [], 1) and "folder fails on every node" in found.general[0]
    assert outcome(verdict(1, wrong={0: "folder"})) == (BAD_NODES, ["node0"], 0), "a single node may well be the cause"


def test_a_silent_rank_makes_its_node_bad():
    found = verdict(silent=(4,))
    assert outcome(found) == (BAD_NODES, ["node2"], 0)
    assert found.nodes[2].problems["answer"] == "rank 4 did not answer within 7 s"


def test_a_node_without_a_name_cannot_be_left_out():
    found = Verdict([Node("(unknown node of rank 2)", [2], problems={"answer": "none"}), Node("node0", [0])], [])
    assert outcome(found) == (NO_NODE_TO_BLAME, [], 0)


def test_who_waits_for_a_silent_rank_is_not_to_blame():
    stuck = {"stage": "an all-reduce over all ranks", "error": "timed out", "offsets": None, "all_ranks": None, "pairs": {}}
    found = verdict(measured={rank: stuck for rank in range(5)})
    assert outcome(found) == (BAD_NODES, ["node2"], 0)
    found = verdict(measured={rank: stuck for rank in range(6)})
    assert outcome(found) == (NO_NODE_TO_BLAME, [], 1) and "an all-reduce over all ranks: timed out" in found.general[0]


@pytest.mark.parametrize(
    "offsets,expected",
    [
        ([0.0, 1.9, -0.1], (FINE, [], 0)),
        ([0.0, 0.1, 60.0], (BAD_NODES, ["node2"], 0)),
        ([0.0, 60.0, 60.1], (BAD_NODES, ["node0"], 0)),
        ([0.0, 60.0, 120.0], (NO_NODE_TO_BLAME, [], 1)),
        ([0.0, 3.0], (NO_NODE_TO_BLAME, [], 1)),
        ([0.0, 0.1, 60.0, 60.1], (NO_NODE_TO_BLAME, [], 1)),
        ([0.0, 0.1, 0.2, 60.0, -60.0], (BAD_NODES, ["node3", "node4"], 0)),
    ],
)
def test_a_clock_is_judged_by_the_majority(offsets, expected):
    assert outcome(verdict(len(offsets), offsets=offsets)) == expected


@pytest.mark.parametrize(
    "pairs,expected",
    [
        ({(0, 1): 0.1, (1, 2): 1.0, (2, 0): 0.1}, (BAD_NODES, ["node0"], 0)),
        ({(0, 1): 0.1, (1, 2): 0.1, (2, 0): 0.1}, (NO_NODE_TO_BLAME, [], 1)),
        ({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}, (NO_NODE_TO_BLAME, [], 1)),
        ({(0, 1): 0.1}, (NO_NODE_TO_BLAME, [], 1)),
        ({(0, 1): 0.1, (1, 2): 0.1, (2, 3): 1.0, (3, 4): 1.0, (4, 0): 1.0}, (BAD_NODES, ["node1"], 0)),
    ],
)
def test_a_slow_node_is_slow_with_every_partner(pairs, expected):
    found = verdict(len({node for pair in pairs for node in pair}), pairs=pairs, all_ranks=0.1)
    assert outcome(found) == expected
    assert outcome(verdict(3, pairs=None, all_ranks=0.6)) == (FINE, [], 0)


def test_a_rank_that_was_interrupted_does_not_make_a_pair_slow():
    nodes = [Node(name, [rank]) for rank, name in enumerate("ab")]
    assert pair_bandwidths(nodes, {0: {"pairs": {"1": 0.1}}, 1: {"pairs": {"0": 0.9}}}) == {0: {1: 0.9}, 1: {0: 0.9}}


def test_the_table_names_what_is_wrong():
    lines = table(verdict(wrong={3: "gpus"}, offsets=[0.0, 0.5, 0.0])).splitlines()
    assert lines[0].split() == ["node", "ranks", "folder", "gpus", "clock", "verdict"]
    assert lines[2].split("  ")[0] == "node1" and lines[2].endswith("BAD: gpus: gpus of 3") and "+0.500 s" in lines[2]
    assert lines[3].endswith("fine") and lines[4] == "all-reduce over all ranks: 1.00 GB/s"


def test_pairs_are_disjoint_in_a_round_and_meet_two_others():
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


def test_ranks_without_a_name_get_that_of_their_block(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    names = {0: "a", 1: "a", 2: "b"}
    assert group_by_node(names, 4, 2) == [("a", [0, 1]), ("b", [2, 3])]
    assert group_by_node({0: "a", 1: "a"}, 4, 2) == [
        ("a", [0, 1]),
        ("(unknown node of rank 2)", [2]),
        ("(unknown node of rank 3)", [3]),
    ]


def test_a_check_that_hangs_or_raises_is_a_failed_check():
    import threading

    assert within(0.05, "name", lambda: str(threading.Event().wait(5.0))) == Check("name", False, "not finished in 0 s")
    assert within(5.0, "name", lambda: str(1 // 0)) == Check("name", False, "integer division or modulo by zero")
    assert within(5.0, "name", lambda: "found") == Check("name", True, "found")


def test_folders(tmp_path):
    assert "GiB free" in check_folder(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    with pytest.raises(OSError, match="less than"):
        check_folder(tmp_path, 2**60)
    with pytest.raises(OSError):
        check_folder(tmp_path / "missing", 1)
    assert "GiB free" in check_run_dir(tmp_path / "run" / "new")


def test_the_next_checkpoint_must_fit(tmp_path):
    shard = tmp_path / "checkpoints" / "step_00000004" / "shard"
    shard.parent.mkdir(parents=True)
    with shard.open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(OSError, match=r"less than the 8192\.0"):
        check_run_dir(tmp_path)
