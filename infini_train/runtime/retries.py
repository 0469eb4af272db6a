"""Retry reads on file systems that are unavailable for a while, as NFS and Lustre during a server's failover."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

RETRY_SECONDS = (1, 4, 15, 40)
"""Waiting times between attempts, in seconds."""
PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ESHUTDOWN", "ENOTCONN", "ECONNRESET", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Error numbers of a file system that may recover."""


def retry_read(read: Callable[[], T], name: object) -> T:
    """Return the result of `read`, and retry for a minute on errors that may pass.

    Args:
        read: function that opens and reads; a file that was opened before may be gone for good.
        name: name of the file, for the warning on stderr.

    Raises:
        OSError: the last error, or the first that cannot pass.
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            print(f"warning: {name} cannot be read ({error.strerror}); trying again in {seconds} s", file=sys.stderr)
        time.sleep(seconds)
    return read()
