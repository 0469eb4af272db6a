"""Parser of the command line: the commands with their options, and the aliases of options."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Protocol

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from infini_train.cli import (
    cancel,
    checkpoint,
    convert,
    evaluate,
    generate,
    logs,
    plan,
    prepare,
    pretrain,
    report,
    status,
    submit,
)
from infini_train.cli.command_list import COMMANDS
from infini_train.cli.configuration import NOT_TEXT, refuse_values_for_sections
from infini_train.config import TASK_KINDS
from infini_train.config.messages import describe_parser_error
from infini_train.runtime.errors import UserError


class CommandModule(Protocol):
    """Module of a command."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options of the command."""

    def run_command(self, arguments: Namespace) -> int:
        """Run the command with its parsed options and return its exit code."""


COMMAND_MODULES: dict[str, CommandModule] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "generate": generate,
    "report": report,
    "checkpoint": checkpoint,
    "convert": convert,
    "plan": plan,
    "submit": submit,
    "status": status,
    "cancel": cancel,
    "logs": logs,
}
"""The module of each command."""


def build_parser(only: str | None = None) -> ArgumentParser:
    """Build the parser of all commands. Its flags are a public interface.

    Args:
        only: the one command that gets its options; None adds the options of all commands. Adding options takes most of the
            time.
    """
    # Refuse abbreviated options: an abbreviation that is unique now becomes ambiguous when a key is added.
    parser = ArgumentParser(
        prog="infini-train", description="Train Infini-attention language models.", exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = ArgumentParser(description=f"infini-train {name}: {help_text}.", exit_on_error=False)
        if only in (None, name):
            COMMAND_MODULES[name].add_arguments(command)
        subcommands.add_subcommand(name, command, help=help_text)
    return parser


def expand_aliases(argv: list[str]) -> list[str]:
    """Replace option aliases by their full names.

    `--task passkey` becomes `--task.kind passkey`. A file or a mapping after `--task` is left unchanged.
    `--profile.steps` becomes `--profiling.steps`. The section is called `profiling` because `submit --profile` names a cluster.
    """
    kinds = "|".join(TASK_KINDS)
    expanded: list[str] = []
    for word in argv:
        word = re.sub(r"^--profile\.steps\b", "--profiling.steps", word)
        if re.fullmatch(rf"--task=({kinds})", word):
            word = word.replace("--task", "--task.kind", 1)
        elif expanded[-1:] == ["--task"] and re.fullmatch(kinds, word):
            expanded[-1] = "--task.kind"
        expanded.append(word)
    return expanded


def parse(argv: list[str]) -> Namespace:
    """Parse a command line. Sections of the configuration become their dataclasses.

    Raises:
        UserError: an unknown option or key, or an invalid value.
        SystemExit: no command was given, or --help or --print_config was given.
    """
    argv = expand_aliases(argv)
    if not argv:
        build_parser().print_help()
        raise SystemExit(UserError.exit_code)
    parser = build_parser(only=argv[0])
    try:
        arguments = parser.parse_args(argv)
        refuse_values_for_sections(arguments.get(argv[0]) or Namespace())
        return parser.instantiate_classes(arguments)
    except ArgumentError as error:
        raise UserError(describe_parser_error(error, argv[0], _options(parser, argv[0]), _config_files(argv))) from error
    except UnicodeDecodeError as error:
        raise UserError(NOT_TEXT) from error


def _options(parser: ArgumentParser, command: str) -> list[str]:
    assert parser._subcommands_action is not None
    chosen = parser._subcommands_action.choices.get(command)
    return [] if chosen is None else list(chosen._option_string_actions)


def _config_files(argv: list[str]) -> list[str]:
    separate = [word for before, word in pairwise(argv) if before == "--config"]
    return separate + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
