"""One-line messages for errors of the command line and YAML parser: key, value, and what to do instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from jsonargparse import ArgumentError

from infini_train.config import TASK_KINDS, RunConfig, holds_key

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
WRONG_FILE = re.compile(r'Parser key "(?P<key>[^"]+)": (?P<what>File does not exist|Path is not a file): \'(?P<path>.*)\'')
WHAT_TO_DO = {"File does not exist": "there is no file", "Path is not a file": "this is a folder, not a file:"}
BROKEN_YAML = re.compile(r'Problems parsing (?P<key>\w+): (?P<what>.*?)(?: in "<unicode string>", (?P<where>.*))?')

USAGE = {
    "status": "RUN",
    "cancel": "RUN [--now]",
    "logs": "RUN [--follow] [--lines N]",
    "checkpoint": "ACTION [--config FILE] [--run_dir RUN] [--path FOLDER] [--output FILE]",
}
"""Arguments of each command that takes a positional argument. RUN is the folder of a run."""
WITHOUT_FLAG = {"run": "RUN", "action": "ACTION"}
"""Names of the positional arguments, as USAGE shows them."""


def describe_parser_error(
    error: ArgumentError, command: str = "", options: Collection[str] = (), files: Sequence[str] = ()
) -> str:
    """Return a one-line message for the user.

    Args:
        command: the command that was called; empty if the error is not from a command line.
        options: options of the command, with dashes, to suggest for an unknown one; empty suggests the keys of a run.
        files: the configuration files, one of which may contain the error.
    """
    names = [option.lstrip("-") for option in options if not option.endswith("+")] or _keys()
    # jsonargparse names a missing option by its key in the namespace, such as `submit.profile`.
    message = re.sub(
        r"(required: ?|, )\w+\.(\w+)",
        lambda found: found[1] + WITHOUT_FLAG.get(found[2], f"--{found[2]}"),
        " ".join(str(error).split()),
    )
    if found := re.fullmatch(r"argument \w+: invalid choice: '(?P<given>.*)' \(choose from (?P<choices>.*)\)", message):
        choices = re.findall(r"'([^']*)'", found["choices"])
        close = difflib.get_close_matches(found["given"], choices, n=1)
        return f"{found['given']} is not one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    unknown = _unknown(message, names, files)
    wrong_words = re.match("unrecognized arguments|the following arguments are required", message)
    if command in USAGE and wrong_words and "did you mean" not in unknown:
        return f"{message}; write `infini-train {command} {USAGE[command]}`"
    if found := re.fullmatch(r"Unexpected config:\s*(?P<text>.*)", message):
        held = found["text"] or "nothing"
        return f"--config: the file holds {held}, but no keys under sections; configs/ has files to start from"
    if found := re.match(r'Parser key "task": Unable to load config [\'"](?P<kind>\w+)[\'"]', message):
        return f"--task is {found['kind']}; it must be one of {', '.join(TASK_KINDS)}"
    return _wrong_value(message) or _wrong_file(message) or unknown or message


def _keys() -> list[str]:
    sections = {key: field.default_factory for key, field in RunConfig.__dataclass_fields__.items()}
    keys = [f"{key}.{name}" for key, factory in sections.items() for name in getattr(factory, "__dataclass_fields__", ())]
    return [*keys, "run_dir"]


def _wrong_value(message: str) -> str:
    """Return the message for a value of the wrong type, or an empty string for any other error."""
    found = WRONG_VALUE.fullmatch(message)
    if found is None:
        return ""
    allowed = re.sub(r"<class '(\w+)'>", lambda kind: TYPES.get(kind[1], kind[1]), found["type"] or found["types"])
    allowed = re.sub(r"typing\.Literal\[([^]]*)\]", lambda names: "one of " + names[1].replace("'", ""), allowed)
    return f"{found['key']} is {found['value'] or found['given']}; it must be {allowed.replace(', null', ', or null')}"


def _wrong_file(message: str) -> str:
    """Return the message for a file that cannot be read, or an empty string for any other error."""
    if found := WRONG_FILE.fullmatch(message):
        return f"--{found['key']}: {WHAT_TO_DO[found['what']]} {found['path']}; configs/ has files to start from"
    if found := BROKEN_YAML.fullmatch(message):
        where = f" ({found['where']})" if found["where"] else ""
        return f"--{found['key']}: the file is not YAML{where}: {found['what']}"
    return ""


def _unknown(message: str, known: Collection[str], files: Sequence[str]) -> str:
    """Return the message for an unknown option or key, or an empty string for any other error."""
    if found := re.search(r"unrecognized arguments: --(?P<name>[^\s=]+)", message):
        return message + _suggestion(found["name"], known, "--")
    if found := re.search(r"does not accept option '(?P<name>[^']+)'", message):
        file = next((f"--config {file}: " for file in files if holds_key(Path(file), found["name"])), "")
        return f"{file}{found['name']} is not a configuration key{_suggestion(found['name'], known, '')}"
    return ""


def _suggestion(name: str, known: Collection[str], dashes: str) -> str:
    """Return a suggestion: the known name nearest to an unknown one.

    If the section is misspelt, the key is looked up in the section with the nearest name.
    """
    sections = {each.partition(".")[0] for each in known if "." in each}
    section, dot, key = name.partition(".")
    if dot and section not in sections and (meant := difflib.get_close_matches(section, sections, n=1)):
        inside = [each for each in known if each.startswith(f"{meant[0]}.")]
        close = difflib.get_close_matches(f"{meant[0]}.{key}", inside, n=1, cutoff=0.8)
        return f"; did you mean {dashes}{close[0]}?" if close else f"; did you mean the section {meant[0]}?"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else "; `--help` lists the valid names"
