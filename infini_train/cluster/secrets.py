"""Keeps values of secrets out of what is written: they live in the environment, and jobs inherit them from there."""

from __future__ import annotations

import json
import os

from infini_train.cluster.environment import is_secret
from infini_train.runtime.errors import UserError

SHORTEST = 8
"""A shorter value is no secret, and would be found everywhere."""


def _secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}


def _written(value: str) -> list[str]:
    """How a value may stand in a text: as it is, or as a shell, YAML and JSON write it between their quotes."""
    return [value, value.replace("'", "'\"'\"'"), value.replace("'", "''"), json.dumps(value)[1:-1]]


def redact(text: str) -> str:
    """The text without values of secrets."""
    for name, value in _secrets().items():
        for each in _written(value):
            text = text.replace(each, f"<{name}>")
    return text


def refuse_secrets(what: str, text: str) -> None:
    """Refuse to write a secret.

    Raises:
        UserError: naming the variable whose value the text holds, never the value.
    """
    for name, value in _secrets().items():
        if any(each in text for each in _written(value)):
            raise UserError(
                f"{what} would hold the value of {name}; take it out of the configuration and the profile: jobs inherit {name} "
                "from the environment of `submit`"
            )
