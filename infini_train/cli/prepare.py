"""`infini-train prepare`: turn text into a tokenizer and shards."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.config.validation import validate_data, validate_task


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace shards that exist")
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    run = run_config(arguments)
    from infini_train.data.preparation import prepare

    validate_data(run)
    validate_task(run)
    prepare(run, overwrite=arguments.overwrite)
    return 0
