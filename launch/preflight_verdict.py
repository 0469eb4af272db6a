"""Form a verdict from the reports of all ranks: bad nodes, and problems that cannot be attributed to single nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NO_PROBLEM, BAD_NODES, GENERAL_PROBLEM = 0, 3, 4
UNKNOWN = "("
"""First character of the placeholder for a node whose name is unknown."""


@dataclass
class Node:
    """The results of one node."""

    name: str
    ranks: list[int]
    checks: dict[str, str] = field(default_factory=dict)
    """Result by name of the check."""
    problems: dict[str, str] = field(default_factory=dict)
    """Problem by name of the check."""


@dataclass
class Verdict:
    """The result of a preflight."""

    nodes: list[Node]
    general: list[str]
    """Problems that cannot be attributed to single nodes."""
    bandwidth: float | None = None
    """GB/s of an all-reduce over all ranks, as measured by the slowest rank."""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Verdict:
        """Create a verdict from the output of `dataclasses.asdict`."""
        return cls(**{**content, "nodes": [Node(**node) for node in content["nodes"]]})

    @property
    def bad_nodes(self) -> list[str]:
        """Names of the nodes with a problem, except nodes with an unknown name."""
        return [node.name for node in self.nodes if node.problems and not node.name.startswith(UNKNOWN)]

    @property
    def exit_code(self) -> int:
        if self.bad_nodes:
            return BAD_NODES
        return GENERAL_PROBLEM if self.general or any(node.problems for node in self.nodes) else NO_PROBLEM


def move_common_problems(nodes: list[Node], general: list[str]) -> None:
    """Move a check that fails on every node to the general problems: a wrong folder, or a limit that no node reaches."""
    if len(nodes) < 2:
        return
    for check in sorted({name for node in nodes for name in node.problems}):
        if all(check in node.problems for node in nodes):
            general.append(f"{check} fails on every node: {nodes[0].problems[check]}")
            for node in nodes:
                node.checks[check] = node.problems.pop(check)


def judge_clocks(nodes: list[Node], offsets: list[float], maximum: float, general: list[str]) -> None:
    """Mark a clock as wrong if it differs too much from the clocks of most other nodes. With two nodes this is undecidable.

    Args:
        offsets: seconds that the clock of each node is ahead of the first node's.
    """
    wrong = []
    for node, own in zip(nodes, offsets, strict=True):
        node.checks["clock"] = f"{own:+.3f} s"
        far = sum(abs(own - other) > maximum for other in offsets)
        if 2 * far > len(nodes) - 1:
            wrong.append(node)
    spread = max(offsets) - min(offsets)
    if spread <= maximum:
        return
    if not wrong or 2 * len(wrong) >= len(nodes):
        general.append(
            f"clocks are {spread:.3f} s apart, more than {maximum:g}, and no majority of the {len(nodes)} nodes agrees"
        )
        return
    for node in wrong:
        node.problems["clock"] = f"{node.checks['clock']} from the first node's, more than {maximum:g} s from most others"


def judge_bandwidth(nodes: list[Node], measured: dict[int, dict[int, float]], minimum: float, general: list[str]) -> None:
    """Mark a node as slow if it is slow with every partner, and fewer than half of the nodes are slow.

    Args:
        measured: GB/s by node and partner.
    """
    slow = []
    for index, node in enumerate(nodes):
        pairs = measured.get(index, {})
        if pairs:
            node.checks["bandwidth"] = ", ".join(f"{value:.2f} GB/s with {nodes[other].name}" for other, value in pairs.items())
            if all(value < minimum for value in pairs.values()):
                slow.append(node)
    if slow and 2 * len(slow) < len(nodes):
        for node in slow:
            node.problems["bandwidth"] = f"{node.checks['bandwidth']}; the minimum is {minimum:g}"
        return
    found = [value for pairs in measured.values() for value in pairs.values()]
    pair_range = f"; pairs of nodes reach {min(found):.2f} to {max(found):.2f}" if found else ""
    general.append(f"bandwidth is below the minimum of {minimum:g} GB/s, and no single node is the cause{pair_range}")


def pair_bandwidths(nodes: list[Node], measured: dict[int, dict[str, Any]]) -> dict[int, dict[int, float]]:
    """Return GB/s by node and partner: the maximum over the ranks of the pair, because an interrupted rank measures less."""
    return {
        one: {
            other: max(
                *(measured[rank]["pairs"][str(other)] for rank in node.ranks),
                *(measured[rank]["pairs"][str(one)] for rank in nodes[other].ranks),
            )
            for other in map(int, measured[node.ranks[0]]["pairs"])
        }
        for one, node in enumerate(nodes)
    }


def judge(
    nodes: list[Node],
    checks: dict[int, list[dict[str, Any]]],
    measured: dict[int, dict[str, Any]] | None,
    *,
    minimum_gigabytes_per_second: float,
    maximum_clock_skew_seconds: float,
    timeout_seconds: float,
) -> Verdict:
    """Form the verdict.

    Args:
        checks: results of the checks by rank. A rank that did not report in time is missing.
        measured: progress of `preflight_bandwidth.measure` by rank, with `error` if it failed. A rank that stopped
            responding is missing. None if nothing was measured.
    """
    general: list[str] = []
    for node in nodes:
        for rank in node.ranks:
            if rank not in checks:
                node.problems["answer"] = f"rank {rank} did not answer within {timeout_seconds:g} s"
                continue
            for check in checks[rank]:
                if not check["ok"]:
                    node.problems.setdefault(check["name"], check["value"])
                elif check["name"] not in node.problems:
                    node.checks[check["name"]] = check["value"]
    move_common_problems(nodes, general)
    verdict = Verdict(nodes, general)
    if measured is None:
        return verdict

    silent = [(node, rank) for node in nodes for rank in node.ranks if rank not in measured]
    for node, rank in silent:
        node.problems["answer"] = f"rank {rank} stopped responding during the joint measurement"
    offsets = next((each["offsets"] for each in measured.values() if each.get("offsets")), None)
    if offsets is not None:
        judge_clocks(nodes, offsets, maximum_clock_skew_seconds, general)
    failed = {rank: each for rank, each in measured.items() if each.get("stage") is not None}
    if failed:
        # Ranks that wait for a silent rank fail as well, but are not the cause.
        if not silent:
            rank, each = min(failed.items())
            general.append(f"rank {rank} failed in {each['stage']}: {each.get('error')}")
        return verdict
    bandwidths = [each["all_ranks"] for each in measured.values() if each.get("all_ranks") is not None]
    if bandwidths and not silent:
        verdict.bandwidth = min(bandwidths)
        if verdict.bandwidth < minimum_gigabytes_per_second and len(nodes) > 1:
            judge_bandwidth(nodes, pair_bandwidths(nodes, measured), minimum_gigabytes_per_second, general)
    return verdict


def table(verdict: Verdict) -> str:
    """Format the verdict as a table with a row for each node, followed by the general problems."""
    names = ("folder", "temp", "gpus", "clock", "bandwidth")
    columns = [name for name in names if any(name in node.checks or name in node.problems for node in verdict.nodes)]
    rows = [["node", "ranks", *columns, "verdict"]]
    for node in verdict.nodes:
        ranks = f"{node.ranks[0]}-{node.ranks[-1]}" if len(node.ranks) > 1 else str(node.ranks[0])
        cells = [node.checks.get(name, "bad" if name in node.problems else "") for name in columns]
        wrong = "; ".join(f"{name}: {problem}" for name, problem in node.problems.items())
        rows.append([node.name, ranks, *cells, f"BAD: {wrong}" if wrong else "fine"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if verdict.bandwidth is not None:
        lines.append(f"all-reduce over all ranks: {verdict.bandwidth:.2f} GB/s")
    return "\n".join([*lines, *(f"general problem: {problem}" for problem in verdict.general)])
