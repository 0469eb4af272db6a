"""`python -m infini_train` is the same as `infini-train`; launchers start ranks with it."""

from infini_train.cli import run_and_exit

run_and_exit()
