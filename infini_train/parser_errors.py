"""What the parser of the command line and of YAML files complains about, in one line: key, value, what to do instead."""

from __future__ import annotations

import difflib
import re

from jsonargparse import ArgumentError

from infini_train.config import TASK_KINDS, RunConfig

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
    "checkpoint": "ACTION [--run_dir RUN] [--path FOLDER] [--output FILE]",
}
"""Of commands that take a word without a flag, what follows their name. RUN is the folder of a run."""
WITHOUT_FLAG = {"run": "RUN", "action": "ACTION"}


def in_words(error: ArgumentError, command: str = "") -> str:
    """The message for the user.

    Args:
        command: what the words were given to, where it was a command.
    """
    # jsonargparse names a missing option by its place in the namespace.
    message = re.sub(
        r"(required: ?|, )\w+\.(\w+)",
        lambda found: found[1] + WITHOUT_FLAG.get(found[2], f"--{found[2]}"),
        " ".join(str(error).split()),
    )
    if command in USAGE and re.match("unrecognized arguments|the following arguments are required", message):
        return f"{message}; write `infini-train {command} {USAGE[command]}`"
    if found := re.fullmatch(r"Unexpected config:\s*(?P<text>.*)", message):
        held = found["text"] or "nothing"
        return f"--config: the file holds {held}, but no keys under sections; configs/ has files to start from"
    if found := re.match(r'Parser key "task": Unable to load config [\'"](?P<kind>\w+)[\'"]', message):
        return f"--task is {found['kind']}; it must be one of {', '.join(TASK_KINDS)}"
    return _wrong_value(message) or _wrong_file(message) or message + _suggestion(message)


def _wrong_value(message: str) -> str:
    """A complaint about the type of a value; empty if it is about something else."""
    found = WRONG_VALUE.fullmatch(message)
    if found is None:
        return ""
    allowed = re.sub(r"<class '(\w+)'>", lambda kind: TYPES.get(kind[1], kind[1]), found["type"] or found["types"])
    allowed = re.sub(r"typing\.Literal\[([^]]*)\]", lambda names: "one of " + names[1].replace("'", ""), allowed)
    return f"{found['key']} is {found['value'] or found['given']}; it must be {allowed.replace(', null', ', or null')}"


def _wrong_file(message: str) -> str:
    """A complaint about a file that cannot be read; empty if it is about something else."""
    if found := WRONG_FILE.fullmatch(message):
        return f"--{found['key']}: {WHAT_TO_DO[found['what']]} {found['path']}; configs/ has files to start from"
    if found := BROKEN_YAML.fullmatch(message):
        where = f" ({found['where']})" if found["where"] else ""
        return f"--{found['key']}: the file is not YAML{where}: {found['what']}"
    return ""


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
