"""Environment variables of a job: the presets in launch/environments/, and the detection of secrets by name."""

from __future__ import annotations

import re
from pathlib import Path

from infini_train.runtime.errors import UserError

PRESETS = Path(__file__).parents[2] / "launch" / "environments"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Words that mark a secret anywhere in a name, with or without a separator: PGPASSWORD, dbPassword.
_SECRET = re.compile(r"PASSW(OR)?D|PASSPHRASE|SECRET|API_?KEY|(ACCESS|PRIVATE|STORAGE|ACCOUNT|ENCRYPTION|SIGNING|AUTH)_KEY")
# Words that mark a secret only at the end of a section between underscores: HF_TOKEN, but neither TOKENIZERS_PARALLELISM nor
# MAX_TOKENS.
_SECRET_ENDING = re.compile(r"(TOKEN|JWT|CREDENTIAL)(_|$)|(^|_)(PASS|PAT|BEARER)$")
# The location of a secret is not itself a secret: HF_TOKEN_PATH.
_LOCATION = re.compile(r"_(FILE|PATH|DIR|NAME)$")


def is_secret(name: str) -> bool:
    """Return whether the name of a variable suggests that it holds a secret."""
    name = name.upper()
    return _LOCATION.search(name) is None and (_SECRET.search(name) is not None or _SECRET_ENDING.search(name) is not None)


def read_environment(name_or_path: str) -> dict[str, str]:
    """Read the variables of a preset in launch/environments/, or of a file given by its path.

    Each line is KEY=VALUE, empty, or a comment that begins with #. The value is everything after the first =. It is used
    literally: nothing is expanded, and quotes around it are refused.

    Args:
        name_or_path: name of a preset. Text that contains a / or ends in .env is a path.

    Raises:
        UserError: the preset or file does not exist, a line is malformed, or a name occurs twice or looks like a secret. The
            message never contains a value.
    """
    if "/" in name_or_path or name_or_path.endswith(".env"):
        path = Path(name_or_path)
    else:
        path = PRESETS / f"{name_or_path}.env"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in PRESETS.glob("*.env")))
            raise UserError(
                f"environment preset {name_or_path!r} is unknown; known are {known}; a path must contain a / or end in .env"
            )
    try:
        # Read bytes: text mode would hide the carriage returns of files from Windows.
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"environment file {str(path)!r} cannot be read: {reason}; give a text file of KEY=VALUE") from error
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, value = _parse(line, f"{path}, line {number}")
        if name in variables:
            raise UserError(f"{path}, line {number}: {name} was set before; set it once")
        variables[name] = value
    return variables


def _parse(line: str, where: str) -> tuple[str, str]:
    name, separator, value = line.partition("=")
    if not separator:
        raise UserError(f"{where} has no =; write KEY=VALUE, or # before a comment")
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{where}: {name!r} is not a variable name; write KEY=VALUE, without export or blanks around =")
    if is_secret(name):
        raise UserError(f"{where}: {name} looks like a secret; set it in the shell that starts the run, processes inherit it")
    if value != value.strip() or (value and not value.isprintable()):
        raise UserError(f"{where}: the value of {name} starts or ends with blanks, or has unprintable characters")
    if value[:1] in ("'", '"') or value[-1:] in ("'", '"'):
        raise UserError(f"{where}: the value of {name} is in quotes; remove them, the value is used literally")
    return name, value
