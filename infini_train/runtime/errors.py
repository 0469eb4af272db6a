"""Exceptions that are reported to the user."""


class UserError(Exception):
    """Bad input from a person: a config value, a file, a layout.

    The message is one line that names the key or file, the value that was found, and what to do instead. The command line
    prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class AgreedError(UserError):
    """A user error that all processes of a run raise together, with the same message."""


class UnhealthyRun(AgreedError):
    """A run that stopped itself, because continuing would waste time or harm the weights."""

    exit_code = 87


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__
