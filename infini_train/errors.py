"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input from a person: a config value, a file, a layout.

    The message is one line that names the key or file, the value that was found, and what to do instead. The command line
    prints it without a traceback and exits with code 2.
    """
