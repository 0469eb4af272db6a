"""Environment variables of a job: presets in launch/environments/, and which names belong to secrets."""

from __future__ import annotations

import re
from pathlib import Path

from infini_train.runtime.errors import UserError

PRESETS = Path(__file__).parents[2] / "launch" / "environments"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Words that mark a secret wherever they stand in a name, also without a separator: PGPASSWORD, dbPassword.
_SECRET = re.compile(r"PASSW(OR)?D|PASSPHRASE|SECRET|API_?KEY|(ACCESS|PRIVATE|STORAGE|ACCOUNT|ENCRYPTION|SIGNING|AUTH)_KEY")
# Words that mark one only where a part of the name ends with them: HF_TOKEN, but neither TOKENIZERS_PARALLELISM nor MAX_TOKENS.
_SECRET_PART = re.compile(r"(TOKEN|JWT|CREDENTIAL)(_|$)|(^|_)(PASS|PAT|BEARER)$")
# The name of a file that holds a secret is none: HF_TOKEN_PATH.
_PLACE = re.compile(r"_(FILE|PATH|DIR|NAME)$")


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as a name can tell."""
    name = name.upper()
    return _PLACE.search(name) is None and (_SECRET.search(name) is not None or _SECRET_PART.search(name) is not None)


def read_environment(name_or_path: str) -> dict[str, str]:
    """Variables of a preset by its name in launch/environments/, or of a file by its path.

    Each line is KEY=VALUE, empty, or a comment that begins with #. The value is everything behind the first =, taken letter by
    letter: nothing is expanded, and quotes around it are refused.

    Args:
        name_or_path: a path if it holds a / or ends in .env.

    Raises:
        UserError: there is no such preset or file, a line is malformed, a name comes twice or looks like a secret. Values are
            never shown.
    """
    if "/" in name_or_path or name_or_path.endswith(".env"):
        path = Path(name_or_path)
    else:
        path = PRESETS / f"{name_or_path}.env"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in PRESETS.glob("*.env")))
            raise UserError(
                f"environment preset {name_or_path!r} is unknown; known are {known}; a path to a file holds a / or ends in .env"
            )
    try:
        # Not in text mode, which would hide the carriage returns of another system.
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
        raise UserError(f"{where}: {name!r} is no name of a variable; write KEY=VALUE, without export or blanks around =")
    if is_secret(name):
        raise UserError(f"{where}: {name} looks like a secret; set it where you start the run: processes inherit it from there")
    if value != value.strip() or (value and not value.isprintable()):
        raise UserError(f"{where}: the value of {name} has blanks at an end or characters that cannot be printed")
    if value[:1] in ("'", '"') or value[-1:] in ("'", '"'):
        raise UserError(f"{where}: the value of {name} stands in quotes; write it without, it is taken letter by letter")
    return name, value
