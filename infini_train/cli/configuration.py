"""Options that set the configuration of a run, and the `RunConfig` built from them."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from infini_train.config import RunConfig
from infini_train.config.messages import describe_parser_error
from infini_train.config.validation import validate_values
from infini_train.runtime.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


NOT_TEXT = "--config: the file is not text in UTF-8; configs/ has files to start from"


def add_config_option(parser: ArgumentParser) -> None:
    """Add --config. It comes before the options of a command, so that help lists it first."""
    parser.add_argument("--config", action="config", help="YAML file of the run; flags after it override its values")


def add_config_keys(parser: ArgumentParser) -> None:
    """Add an option for every key of `RunConfig`."""
    parser.add_class_arguments(RunConfig)


def add_run_dir_options(parser: ArgumentParser) -> None:
    """Add --config and --run_dir for a command that needs only the folder of a run."""
    parser.add_argument("--config", type=str, action="append", help="YAML file of the run; only its run_dir is used")
    parser.add_argument(
        "--run_dir",
        type=str | None,
        default=None,
        help=f"folder of the run; default: run_dir of --config or {RunConfig.run_dir}",
    )


def run_dir_of(arguments: Namespace) -> Path:
    """Return the folder of the run that the options of `add_run_dir_options` name.

    Raises:
        UserError: a configuration file is invalid.
    """
    run = read_config(*map(Path, arguments.config)) if arguments.config else RunConfig()
    return Path(run.run_dir if arguments.run_dir is None else arguments.run_dir)


def refuse_values_for_sections(parsed: Namespace) -> None:
    """Raise UserError if a configuration has a value in the place of a section."""
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
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_config_option(parser)
    add_config_keys(parser)
    try:
        arguments = parser.parse_args([f"--config={path}" for path in paths])
        refuse_values_for_sections(arguments)
        return run_config(parser.instantiate_classes(arguments))
    except ArgumentError as error:
        raise UserError(describe_parser_error(error, files=[str(path) for path in paths])) from error
    except UnicodeDecodeError as error:
        raise UserError(NOT_TEXT) from error
