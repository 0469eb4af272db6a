"""File systems that are away for a while, as NFS and Lustre are while a server fails over or has forgotten this client."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

RETRY_SECONDS = (1, 4, 15, 40)
"""How long a read that failed is put off, time after time."""
PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ESHUTDOWN", "ENOTCONN", "ECONNRESET", "EREMOTEIO")
    if hasattr(errno, name)
}
"""What they answer then."""


def patiently(read: Callable[[], T], name: object) -> T:
    """What `read` gives, tried again for a minute where the error may pass.

    Args:
        read: opens what it reads: what was opened before may be gone for good.
        name: of the file, for the warning on stderr.

    Raises:
        OSError: the last one, or the first that will not pass.
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
