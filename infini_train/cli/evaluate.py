"""`infini-train evaluate`: measure perplexity or retrieval, or compare attention variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.checks import check_run_and_data, check_run_and_tokenizer, world_size
from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.cli.trained_model import add_checkpoint_option, with_model
from infini_train.config import RunConfig
from infini_train.config.validation import validate, validate_compare
from infini_train.runtime.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    parser.add_argument(
        "what",
        nargs="?",
        choices=["perplexity", "passkey", "compare"],
        default="perplexity",
        help="perplexity: measure it on the held-out split (default); passkey: measure accuracy on the task that section "
        "task configures; compare: train and evaluate the attention variants that section compare lists",
    )
    add_checkpoint_option(parser)
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    run = run_config(arguments)
    if arguments.what == "passkey":
        return _evaluate_passkey(run, arguments)
    if arguments.what == "compare":
        return _evaluate_compare(run)
    return with_model(run, arguments, lambda commands, run, checkpoint: commands.evaluate(run, checkpoint))


def _evaluate_passkey(run: RunConfig, arguments: Namespace) -> int:
    def measure(commands: Any, run: RunConfig, checkpoint: Path) -> None:
        from infini_train.evaluation import retrieval_command

        retrieval_command.evaluate_passkey(retrieval_command.evaluation_run(run, world_size()), checkpoint)

    return with_model(run, arguments, measure, check_run_and_tokenizer)


def _evaluate_compare(run: RunConfig) -> int:
    if world_size() > 1:
        raise UserError("evaluate compare starts one process for each of its runs; call it without a launcher")
    validate_compare(run)
    from infini_train.evaluation import comparison as compare

    for each in compare.compare_runs(run):
        try:
            validate(each.run, 1)
        except UserError as error:
            raise UserError(f"compare.variants {each.variant!r}: {error}") from error
    check_run_and_data(run)
    return compare.compare(run)
