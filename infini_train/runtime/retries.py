"""Retries for reads from network file systems.

NFS and Lustre return errors for a while when a server fails over or has dropped this client.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

RETRY_SECONDS = (1, 4, 15, 40)
"""Delays before the first, second, ... retry of a failed read."""
TRANSIENT_ERRORS = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ESHUTDOWN", "ENOTCONN", "ECONNRESET", "EREMOTEIO")
    if hasattr(errno, name)
}
"""errno values of a network file system that is temporarily unavailable."""


def retry_read(read: Callable[[], T], name: object) -> T:
    """Call `read` and return its result; retry for one minute while it fails with a transient error.

    Args:
        read: function that opens the file and reads it. It must open the file on each call, because a descriptor opened
            before the failure may stay invalid.
        name: name of the file for the warning on stderr.

    Raises:
        OSError: the error of the last retry, or the first error that is not transient.
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            print(f"warning: {name} cannot be read ({error.strerror}); trying again in {seconds} s", file=sys.stderr)
        time.sleep(seconds)
    return read()
