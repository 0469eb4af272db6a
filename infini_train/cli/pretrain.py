"""`infini-train pretrain`: train a model, or resume from the newest checkpoint."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.checks import check_initial_weights_of, check_run_and_data
from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.runtime.standard_streams import ignore_stream_errors


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    parser.add_argument(
        "--check_only",
        action="store_true",
        help="check configuration and data for this many processes, then stop",
    )
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    run = run_config(arguments)
    ignore_stream_errors()
    check_run_and_data(run)
    check_initial_weights_of(run)
    if run.checkpoint.copy_to is not None:
        from infini_train.checkpoint.remote import check_url

        check_url(run.checkpoint.copy_to)
    if arguments.check_only:
        return 0
    from infini_train.runtime import platform

    platform.install()
    from infini_train.training.loop import pretrain

    return pretrain(run)
