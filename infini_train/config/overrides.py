"""Override keys of a run with values given as text, as the command line does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from jsonargparse import ArgumentError, ArgumentParser

from infini_train.config import RunConfig
from infini_train.config.messages import describe_parser_error
from infini_train.runtime.errors import UserError


def with_overrides(run: RunConfig, values: Mapping[str, str], where: str) -> RunConfig:
    """Return a copy of the run with these keys changed.

    Args:
        values: text by key, such as `{"model.update_rule": "delta"}`.
        where: the source of the values, such as `--sweep`; error messages begin with it.

    Raises:
        UserError: an unknown key or an invalid value.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    options = [f"--{key}={value}" for key, value in values.items()]
    try:
        parsed = parser.parse_args(options, namespace=parser.parse_object(asdict(run)))
    except ArgumentError as error:
        raise UserError(f"{where}: {describe_parser_error(error)}") from error
    instantiated = parser.instantiate_classes(parsed)
    return RunConfig(**{name: instantiated[name] for name in RunConfig.__dataclass_fields__})
