"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Bad input from a person: a config value, a file, a layout.

    The message is one line that names the key or file, the value that was found, and what to do instead. The command line
    prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class AgreedError(UserError):
    """One that all processes of a run raise together, with the same words."""


class UnhealthyRun(AgreedError):
    """A run that stopped itself, because going on would waste time or harm the weights: a person must look at it."""

    exit_code = 87


def one_line(error: BaseException) -> str:
    """What an exception says, without its line ends."""
    return " ".join(str(error).split()) or type(error).__name__
