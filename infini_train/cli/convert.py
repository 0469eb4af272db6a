"""`infini-train convert`: convert weights from and to Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--source",
        type=str,
        required=True,
        help="either a folder of transformers' save_pretrained with config.json, safetensors and a tokenizer, which is "
        "converted to weights for training.initial_weights and a configuration; or a folder step_XXXXXXXX or a file of "
        "`checkpoint consolidate`, which is converted to a folder of transformers",
    )
    parser.add_argument("--output", type=str, required=True, help="folder to write; it must not exist yet")


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    from infini_train.convert.conversion import convert

    print(*convert(Path(arguments.source), Path(arguments.output)), sep="\n")
    return 0
