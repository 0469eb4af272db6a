"""Reads what `scontrol --oneliner show` prints."""

from __future__ import annotations

import re

# Values may hold spaces (a path, a reason) and "=" (TRES); a key starts with a capital letter, after a space.
FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)")

# States in which a job is at its end, unless somebody requeues it.
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)


def parse_records(text: str) -> list[dict[str, str]]:
    """One dictionary a line, with the keys that scontrol prints: "JobState", "Restarts", "ExitCode", "NodeList"."""
    return [dict(FIELD.findall(line)) for line in text.splitlines() if "=" in line]
