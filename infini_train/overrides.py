"""A run with some keys set to values that are written as text, as the command line sets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from jsonargparse import ArgumentError, ArgumentParser

from infini_train.config import RunConfig
from infini_train.errors import UserError
from infini_train.parser_errors import in_words


def with_overrides(run: RunConfig, values: Mapping[str, str], where: str) -> RunConfig:
    """The run with these keys changed.

    Args:
        values: text by key, as model.update_rule: delta.
        where: what to name in an error, as --sweep.

    Raises:
        UserError: a key that is none, or a text that is no value of it.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    options = [f"--{key}={value}" for key, value in values.items()]
    try:
        parsed = parser.parse_args(options, namespace=parser.parse_object(asdict(run)))
    except ArgumentError as error:
        raise UserError(f"{where}: {in_words(error)}") from error
    instantiated = parser.instantiate_classes(parsed)
    return RunConfig(**{name: instantiated[name] for name in RunConfig.__dataclass_fields__})
