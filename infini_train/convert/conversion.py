"""`infini-train convert`: conversion between a Hugging Face transformers folder and weights of this package."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from infini_train.checkpoint.folder import is_committed
from infini_train.checkpoint.weights_file import SUFFIX
from infini_train.convert.from_hugging_face import convert_from
from infini_train.convert.to_hugging_face import convert_to
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import report_write_errors


def convert(source: Path, output: Path) -> list[str]:
    """Convert `source` and write the result to the folder `output`. The folder appears only when it is complete.

    Args:
        source: a transformers folder with config.json, a checkpoint folder, or a weights file. It sets the direction.
        output: folder to create; it must not exist.

    Returns:
        Lines to print for the user.

    Raises:
        UserError: `source` cannot be converted, or `output` exists or cannot be written.
    """
    if source.suffix == SUFFIX or is_committed(source):
        write = convert_to
    elif (source / "config.json").is_file():
        write = convert_from
    else:
        raise UserError(
            f"--source {source} is neither a folder of Hugging Face transformers (with config.json), nor a finished checkpoint "
            f"step_XXXXXXXX, nor a {SUFFIX} file of weights"
        )
    if output.exists():
        raise UserError(f"--output {output} exists; name another folder, or delete it")
    partial = output.with_name(output.name + ".partial")
    try:
        with report_write_errors(f"--output {output}", "free space there, or name another folder", SafetensorError):
            shutil.rmtree(partial, ignore_errors=True)  # of a program that was killed
            partial.mkdir(parents=True)
            lines = write(source, partial, output)
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines
