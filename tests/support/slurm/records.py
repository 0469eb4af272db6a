"""Parse the output of `scontrol --oneliner show`."""

from __future__ import annotations

import re

# Values may contain spaces (a path, a reason) and "=" (TRES). A key starts with a capital letter, after a space.
FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)")

# States of a job that has ended, unless it is requeued.
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)


def parse_records(text: str) -> list[dict[str, str]]:
    """Return one dictionary per line, with scontrol's keys: "JobState", "Restarts", "ExitCode", "NodeList"."""
    return [dict(FIELD.findall(line)) for line in text.splitlines() if "=" in line]
