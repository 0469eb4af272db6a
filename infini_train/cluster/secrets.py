"""Keep secrets out of written files. Secrets stay in environment variables, which jobs inherit."""

from __future__ import annotations

import json
import os

from infini_train.cluster.environment import is_secret
from infini_train.runtime.errors import UserError

MINIMUM_SECRET_LENGTH = 8
"""Length in characters from which a value counts as a secret. Shorter values would match unrelated text."""


def _secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= MINIMUM_SECRET_LENGTH}


def _escaped_forms(value: str) -> list[str]:
    """Return the forms in which a text may contain a value: verbatim, or escaped inside shell, YAML or JSON quotes."""
    return [value, value.replace("'", "'\"'\"'"), value.replace("'", "''"), json.dumps(value)[1:-1]]


def redact(text: str) -> str:
    """Replace the values of secrets in a text by `<NAME>`."""
    for name, value in _secrets().items():
        for each in _escaped_forms(value):
            text = text.replace(each, f"<{name}>")
    return text


def refuse_secrets(what: str, text: str) -> None:
    """Refuse a text that contains the value of a secret.

    Raises:
        UserError: the text contains a secret. The message names the variable, never its value.
    """
    for name, value in _secrets().items():
        if any(each in text for each in _escaped_forms(value)):
            raise UserError(
                f"{what} would contain the value of {name}; remove it from the configuration and the profile, because jobs "
                f"inherit {name} from the environment of `submit`"
            )
