"""What the parser of the command line and of YAML files complains about, in one line: key, value, what to do instead."""

from __future__ import annotations

import difflib
import re

from jsonargparse import ArgumentError

from infini_train.config import RunConfig

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "NoneType": "null",
}
WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[^"]+)": '
    r"(?:Expected a (?P<type>.*)\. Got value: (?P<value>.*)|.*Subtypes: \[(?P<types>.*)\] Errors: .*Given value: (?P<given>.*))"
)


def in_words(error: ArgumentError) -> str:
    """The message for the user."""
    # jsonargparse names a missing option by its place in the namespace.
    message = re.sub(r"(required: ?|, )\w+\.(\w+)", r"\1--\2", " ".join(str(error).split()))
    return _wrong_value(message) or message + _suggestion(message)


def _wrong_value(message: str) -> str:
    """A complaint about the type of a value; empty if it is about something else."""
    found = WRONG_VALUE.fullmatch(message)
    if found is None:
        return ""
    allowed = re.sub(r"<class '(\w+)'>", lambda kind: TYPES.get(kind[1], kind[1]), found["type"] or found["types"])
    allowed = re.sub(r"typing\.Literal\[([^]]*)\]", lambda names: "one of " + names[1].replace("'", ""), allowed)
    return f"{found['key']} is {found['value'] or found['given']}; it must be {allowed.replace(', null', ', or null')}"


def _suggestion(message: str) -> str:
    """The known key that is nearest to an unknown one."""
    unknown = re.search(r"unrecognized arguments: --(\S+)|does not accept option '([^']+)'", message)
    if unknown is None:
        return ""
    sections = {key: field.default_factory for key, field in RunConfig.__dataclass_fields__.items()}
    known = [
        f"{key}.{name}" for key, factory in sections.items() for name in getattr(factory, "__dataclass_fields__", {"": None})
    ]
    close = difflib.get_close_matches((unknown[1] or unknown[2]).split("=")[0], [*known, "run_dir"], n=1)
    return f"; did you mean {close[0]}?" if close else "; `--help` lists the keys"
