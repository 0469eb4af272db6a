"""Comparison of observed messages with planned messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from infini_train.planning.communication import Traffic, stage_traffic
from infini_train.planning.dry_run.recorded_operations import Message
from infini_train.planning.sizes import Sizes

SMALL = 4096
"""Largest message in bytes that is ignored. Messages of this size are norms, flags or counts, which the plan leaves out."""

_Key = tuple[str, int, int]
"""Operation, number of processes in the group, and distance between their ranks."""


def message_differences(sizes: Sizes, stage: int, messages: Iterable[Message]) -> list[str]:
    """Return the differences between the messages of one step and the plan, one line each; empty if they agree.

    In tensor, context and pipeline groups, each message size must occur exactly as often as planned. DeepSpeed splits its
    messages by parameter group and pads them to equal sizes. So for data-parallel groups the sum of bytes must agree within 1%.
    """
    found: dict[_Key, Counter[int]] = {}
    for message in messages:
        found.setdefault(_message_key(message), Counter())[message.bytes] += 1
    differences = []
    planned: dict[tuple[_Key, int], list[Traffic]] = {}
    data = []
    for item in stage_traffic(sizes, stage):
        if item.kind == "data":
            data.append(item)
        else:
            planned.setdefault((_traffic_key(item), item.bytes), []).append(item)
    for (key, size), items in planned.items():
        seen, expected = found.get(key, Counter()).pop(size, 0), sum(item.messages for item in items)
        if seen != expected:
            names = " and ".join(map(_name, items))
            differences.append(f"{names}, each of {size:,} bytes: planned {expected}, seen {seen}")
    for item in data:
        seen = sum(size * number for size, number in found.pop(_traffic_key(item), Counter()).items())
        share = seen / (item.messages * item.bytes)
        # With ZeRO-3, DeepSpeed keeps some gathered weights between uses, so it gathers less often than planned.
        lowest = 0.5 if sizes.run.layout.zero_stage == 3 and item.operation == "all_gather" else 0.99
        if not lowest <= share <= 1.01:
            differences.append(f"{_name(item)}: planned {item.messages * item.bytes:,} bytes, seen {seen:,}")
    for key, counts in found.items():
        for size, number in counts.items():
            # A group of one process sends nothing. Received messages are counted on the sender.
            if size > SMALL and key[1] != 1 and key[0] not in ("receive", "broadcast"):
                differences.append(f"{key[0]} over {key[1]} ranks of {size:,} bytes: not planned, seen {number}")
    return differences


def _name(item: Traffic) -> str:
    return f"{item.kind} {item.operation} ({item.what})"


def _message_key(message: Message) -> _Key:
    if message.operation == "send":  # the group is the whole pipeline or its two end stages
        return ("send", 0, 0)
    stride = message.ranks[1] - message.ranks[0] if len(message.ranks) > 1 else 0
    return (message.operation, len(message.ranks), stride)


def _traffic_key(item: Traffic) -> _Key:
    return ("send", 0, 0) if item.operation == "send" else (item.operation, item.size, item.stride)
