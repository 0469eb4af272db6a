"""The grammar of the command line and of configuration files: commands, options, and a run made of them."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from infini_train.cluster import command as cluster
from infini_train.commands import COMMANDS
from infini_train.config import TASK_KINDS, RunConfig
from infini_train.errors import UserError
from infini_train.parser_errors import in_words
from infini_train.planning import command as planning
from infini_train.validation import validate_values

set_parsing_settings(docstring_parse_attribute_docstrings=True)

WITHOUT_CONFIG = {"checkpoint", "convert", "status", "cancel", "logs"}
"""Commands that look at what is there; of a configuration they need the run directory at most."""
CHECKPOINT_ACTIONS = {
    "list": "every checkpoint of the run",
    "verify": "read every byte of a checkpoint, or of all, and compare with the checksums",
    "inspect": "what a checkpoint holds",
    "consolidate": "write the weights as one safetensors file",
}


def build_parser(only: str | None = None) -> ArgumentParser:
    """The parser of all commands; its flags are part of the product.

    Args:
        only: a command; the others get no options then, which takes most of the time.
    """
    # Beginnings of options are refused: what is unique today is ambiguous after the next key.
    parser = ArgumentParser(
        prog="infini-train", description="Train Infini-attention language models.", exit_on_error=False, allow_abbrev=False
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = ArgumentParser(description=f"infini-train {name}: {help_text}.", exit_on_error=False)
        if only in (None, name):
            _add_arguments(name, command)
        subcommands.add_subcommand(name, command, help=help_text)
    return parser


def _add_arguments(name: str, command: ArgumentParser) -> None:
    if name in WITHOUT_CONFIG:
        if name == "checkpoint":
            _add_checkpoint_arguments(command)
        elif name == "convert":
            _add_convert_arguments(command)
        else:
            cluster.add_run_argument(name, command)
        return
    command.add_argument("--config", action="config", help="YAML file of the run; flags after it override its values")
    if name == "submit":
        cluster.add_submit_arguments(command)
    if name == "plan":
        planning.add_arguments(command)
    if name == "prepare":
        command.add_argument("--overwrite", action="store_true", help="replace shards that exist")
    if name == "evaluate":
        command.add_argument(
            "what",
            nargs="?",
            choices=["perplexity", "passkey", "compare"],
            default="perplexity",
            help="perplexity of the held-out split (default); passkey: accuracy on the task of the section task; compare: "
            "train the attention variants of the section compare side by side",
        )
    if name in ("evaluate", "generate"):
        command.add_argument(
            "--from_checkpoint",
            type=str | None,
            default=None,
            help="folder step_XXXXXXXX, or a file of `checkpoint consolidate`; the newest of the run by default",
        )
    if name == "generate":
        from_held_out = "the first half of the longest held-out document, at most 32 segments of it, by default"
        command.add_argument("--prompt", type=str | None, default=None, help=f"text to continue; {from_held_out}")
        command.add_argument("--prompt_file", type=str | None, default=None, help="file that holds the text to continue")
        command.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate at most")
        command.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
        command.add_argument("--top_k", type=int, default=50, help="sample among the k most likely; 0 takes all")
        command.add_argument("--sample_seed", type=int, default=0, help="seed of the sampling")
    if name == "pretrain":
        command.add_argument(
            "--check_only",
            action="store_true",
            help="check configuration and data for this many processes, then stop",
        )
    command.add_class_arguments(RunConfig)


def _add_checkpoint_arguments(command: ArgumentParser) -> None:
    actions = "; ".join(f"{action}: {text}" for action, text in CHECKPOINT_ACTIONS.items())
    command.add_argument("action", choices=list(CHECKPOINT_ACTIONS), help=actions)
    command.add_argument(
        "--config", type=str, action="append", help="YAML file of the run, of which the run directory is taken"
    )
    command.add_argument(
        "--run_dir", type=str | None, default=None, help=f"folder of the run; --config's, or {RunConfig.run_dir}, by default"
    )
    command.add_argument(
        "--path", type=str | None, default=None, help="a folder step_XXXXXXXX; the newest of the run by default (verify: all)"
    )
    command.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="safetensors file that consolidate writes; RUN_DIR/step_XXXXXXXX.safetensors by default",
    )


def _add_convert_arguments(command: ArgumentParser) -> None:
    command.add_argument(
        "--source",
        type=str,
        required=True,
        help="a folder of transformers' save_pretrained with config.json, safetensors and a tokenizer: it becomes weights for "
        "training.initial_weights and a configuration; or a folder step_XXXXXXXX or a file of `checkpoint consolidate`: it "
        "becomes a folder for transformers",
    )
    command.add_argument("--output", type=str, required=True, help="folder to write, which must not exist")


def spelled_out(argv: list[str]) -> list[str]:
    """`--task passkey` is short for `--task.kind passkey`; a file or a mapping after --task stays what it is.

    `--profile.steps` is `--profiling.steps`: the section has another name because `submit --profile` names a cluster.
    """
    kinds = "|".join(TASK_KINDS)
    spelled: list[str] = []
    for word in argv:
        word = re.sub(r"^--profile\.steps\b", "--profiling.steps", word)
        if re.fullmatch(rf"--task=({kinds})", word):
            word = word.replace("--task", "--task.kind", 1)
        elif spelled[-1:] == ["--task"] and re.fullmatch(kinds, word):
            spelled[-1] = "--task.kind"
        spelled.append(word)
    return spelled


def parse(argv: list[str]) -> Namespace:
    """What the words of a command line say, sections of the configuration as their dataclasses.

    Raises:
        UserError: an option, a key or a value that is none.
        SystemExit: there is no command, or --help or --print_config was asked for.
    """
    argv = spelled_out(argv)
    if not argv:
        build_parser().print_help()
        raise SystemExit(UserError.exit_code)
    parser = build_parser(only=argv[0])
    try:
        arguments = parser.parse_args(argv)
        _refuse_values_for_sections(arguments.get(argv[0]) or Namespace())
        return parser.instantiate_classes(arguments)
    except ArgumentError as error:
        raise UserError(in_words(error, argv[0], _options(parser, argv[0]), _config_files(argv))) from error
    except UnicodeDecodeError as error:
        raise UserError("--config: the file is not text in UTF-8; configs/ has files to start from") from error


def _options(parser: ArgumentParser, command: str) -> list[str]:
    assert parser._subcommands_action is not None
    chosen = parser._subcommands_action.choices.get(command)
    return [] if chosen is None else list(chosen._option_string_actions)


def _config_files(argv: list[str]) -> list[str]:
    separate = [word for before, word in pairwise(argv) if before == "--config"]
    return separate + [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]


def _refuse_values_for_sections(parsed: Namespace) -> None:
    for name, field in RunConfig.__dataclass_fields__.items():
        value = parsed.get(name)
        if is_dataclass(field.default_factory) and value is not None and not isinstance(value, Namespace):
            raise UserError(f"{name} is {value!r} in the configuration, but it is a section: put keys with values under it")


def run_config(section: Namespace) -> RunConfig:
    """The run among a command's options.

    Raises:
        UserError: a key without a value, or a number that is none.
    """
    fields = RunConfig.__dataclass_fields__
    run = RunConfig(**{name: section[name] for name in fields})
    validate_values(run)
    return run


def read_config(*paths: Path) -> RunConfig:
    """The run of YAML files, later ones over earlier ones, as `pretrain --config` reads it.

    Raises:
        UserError: a key or value that is wrong.
    """
    return run_config(parse(["pretrain", *(f"--config={path}" for path in paths)]).pretrain)
