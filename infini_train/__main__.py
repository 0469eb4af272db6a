"""Entry point of `python -m infini_train`, which equals `infini-train`. Launchers start ranks with it."""

from infini_train.cli.main import run_and_exit

run_and_exit()
