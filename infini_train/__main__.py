"""`python -m infini_train` is the same as `infini-train`; launchers start ranks with it."""

import signal
import sys

from infini_train.cli import main

code = main()
# What is done is done: a launcher counts a rank that SIGTERM ended as one that had not begun.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(code)
