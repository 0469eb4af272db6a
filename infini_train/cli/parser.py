"""Parser of the command line and of configuration files: commands, options, and the `RunConfig` built from them."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from infini_train.cli import cluster as cluster
from infini_train.cli import plan as planning
from infini_train.cli.command_list import COMMANDS
from infini_train.config import TASK_KINDS, RunConfig
from infini_train.config.messages import describe_parser_error
from infini_train.config.validation import validate_values
from infini_train.runtime.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

WITHOUT_CONFIG = {"checkpoint", "convert", "status", "cancel", "logs"}
"""Commands that act on existing runs or files. They read at most the run directory from a configuration."""
CHECKPOINT_ACTIONS = {
    "list": "show every checkpoint of the run",
    "verify": "read every byte of one checkpoint, or of all, and compare with the checksums",
    "inspect": "show the contents of a checkpoint",
    "consolidate": "write the weights as one safetensors file",
}


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
            help="perplexity: measure it on the held-out split (default); passkey: measure accuracy on the task that section "
            "task configures; compare: train and evaluate the attention variants that section compare lists",
        )
    if name in ("evaluate", "generate"):
        command.add_argument(
            "--from_checkpoint",
            type=str | None,
            default=None,
            help="folder step_XXXXXXXX, or a file of `checkpoint consolidate`; default: the newest checkpoint of the run",
        )
    if name == "generate":
        from_held_out = "default: the first half of the longest held-out document, at most 32 segments"
        command.add_argument("--prompt", type=str | None, default=None, help=f"text to continue; {from_held_out}")
        command.add_argument("--prompt_file", type=str | None, default=None, help="file with the text to continue")
        command.add_argument("--max_new_tokens", type=int, default=200, help="maximum number of tokens to generate")
        command.add_argument("--temperature", type=float, default=0.8, help="temperature; 0 selects the most likely token")
        command.add_argument("--top_k", type=int, default=50, help="sample from the k most likely tokens; 0 samples from all")
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
    command.add_argument("--config", type=str, action="append", help="YAML file of the run; only its run_dir is used")
    command.add_argument(
        "--run_dir",
        type=str | None,
        default=None,
        help=f"folder of the run; default: run_dir of --config or {RunConfig.run_dir}",
    )
    command.add_argument(
        "--path", type=str | None, default=None, help="a folder step_XXXXXXXX; default: the newest checkpoint (verify: all)"
    )
    command.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="safetensors file that consolidate writes; default: RUN_DIR/step_XXXXXXXX.safetensors",
    )


def _add_convert_arguments(command: ArgumentParser) -> None:
    command.add_argument(
        "--source",
        type=str,
        required=True,
        help="either a folder of transformers' save_pretrained with config.json, safetensors and a tokenizer, which is "
        "converted to weights for training.initial_weights and a configuration; or a folder step_XXXXXXXX or a file of "
        "`checkpoint consolidate`, which is converted to a folder of transformers",
    )
    command.add_argument("--output", type=str, required=True, help="folder to write; it must not exist yet")


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
        _refuse_values_for_sections(arguments.get(argv[0]) or Namespace())
        return parser.instantiate_classes(arguments)
    except ArgumentError as error:
        raise UserError(describe_parser_error(error, argv[0], _options(parser, argv[0]), _config_files(argv))) from error
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
    """Build the run from the parsed options of a command.

    Raises:
        UserError: a key without a value, or a number that is not finite or too large.
    """
    fields = RunConfig.__dataclass_fields__
    run = RunConfig(**{name: section[name] for name in fields})
    validate_values(run)
    return run


def read_config(*paths: Path) -> RunConfig:
    """Read a run from YAML files as `pretrain --config` does. Later files override earlier ones.

    Raises:
        UserError: an unknown key or an invalid value.
    """
    return run_config(parse(["pretrain", *(f"--config={path}" for path in paths)]).pretrain)
