"""`infini-train generate`: continue a prompt with streaming inference."""

from __future__ import annotations

import math
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.checks import check_run_and_held_out, check_run_and_tokenizer, world_size
from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.cli.trained_model import add_checkpoint_option, with_model
from infini_train.runtime.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    add_checkpoint_option(parser)
    from_held_out = "default: the first half of the longest held-out document, at most 32 segments"
    parser.add_argument("--prompt", type=str | None, default=None, help=f"text to continue; {from_held_out}")
    parser.add_argument("--prompt_file", type=str | None, default=None, help="file with the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="maximum number of tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="temperature; 0 selects the most likely token")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k most likely tokens; 0 samples from all")
    parser.add_argument("--sample_seed", type=int, default=0, help="seed of the sampling")
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    run = run_config(arguments)
    prompt = arguments.prompt
    _check_sampling(arguments)
    if arguments.prompt_file is not None:
        try:
            # Decode as `prepare` does: keep line ends and drop a byte order mark.
            prompt = Path(arguments.prompt_file).read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {arguments.prompt_file} cannot be read: {error}") from error
    if run.layout.pipeline_parallel_size > 1 and world_size() > 1:
        raise UserError(
            f"layout.pipeline_parallel_size is {run.layout.pipeline_parallel_size}; generate does not support pipeline "
            "parallelism; start it as one process"
        )
    return with_model(
        run,
        arguments,
        lambda commands, run, checkpoint: commands.generate(
            run,
            checkpoint,
            prompt,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.top_k,
            arguments.sample_seed,
        ),
        check_run_and_held_out if prompt is None else check_run_and_tokenizer,
    )


def _check_sampling(arguments: Namespace) -> None:
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UserError("--prompt and --prompt_file are both given; give one")
    try:
        (arguments.prompt or "").encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not text in UTF-8; put it into a file and use --prompt_file") from error
    if not (arguments.temperature == 0 or 0.001 <= arguments.temperature < math.inf):
        raise UserError(f"--temperature is {arguments.temperature}; use 0 for the most likely token, or at least 0.001")
    for name, least in (("top_k", 0), ("max_new_tokens", 1), ("sample_seed", 0)):
        if not least <= (value := getattr(arguments, name)) < 1 << 63:
            raise UserError(f"--{name} is {value}; use a number from {least} to 2^63 - 1")
