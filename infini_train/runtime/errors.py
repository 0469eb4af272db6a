"""Exceptions whose message is shown to the user without a traceback."""


class UserError(Exception):
    """Invalid user input: a config value, a file or a layout.

    The message is one line. It names the key or file, the value that was found, and the remedy. The command line prints the
    message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class AgreedError(UserError):
    """A user error that all ranks of a run raise together, with the same message."""


class UnhealthyRun(AgreedError):
    """A run that stopped itself because it is unhealthy.

    Training further would waste time or damage the weights, so a person has to look at the run before it continues.
    """

    exit_code = 87


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
