"""`infini-train checkpoint`: list, verify, inspect or consolidate checkpoints."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.configuration import add_run_dir_options, run_dir_of
from infini_train.runtime.errors import UserError

ACTIONS = {
    "list": "show every checkpoint of the run",
    "verify": "read every byte of one checkpoint, or of all, and compare with the checksums",
    "inspect": "show the contents of a checkpoint",
    "consolidate": "write the weights as one safetensors file",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    actions = "; ".join(f"{action}: {text}" for action, text in ACTIONS.items())
    parser.add_argument("action", choices=list(ACTIONS), help=actions)
    add_run_dir_options(parser)
    parser.add_argument(
        "--path", type=str | None, default=None, help="a folder step_XXXXXXXX; default: the newest checkpoint (verify: all)"
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="safetensors file that consolidate writes; default: RUN_DIR/step_XXXXXXXX.safetensors",
    )


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    from infini_train.checkpoint import folder, inspection

    run_dir = run_dir_of(arguments)
    if arguments.action == "list":
        if arguments.path is not None:
            raise UserError(
                f"--path is {arguments.path}, but list shows all checkpoints of --run_dir; leave --path out, or use inspect"
            )
        return inspection.list_all(run_dir)
    paths = folder.list_checkpoints(run_dir) if arguments.path is None else [Path(arguments.path)]
    if arguments.path is not None and not paths[0].is_dir():
        raise UserError(
            f"--path {arguments.path}: there is no such folder; `infini-train checkpoint list` shows the checkpoints of a run"
        )
    if not paths:
        raise UserError(f"run_dir {run_dir} holds no checkpoint; name another --run_dir, or a folder with --path")
    if arguments.action == "verify":
        return inspection.verify(paths)
    if arguments.action == "inspect":
        return inspection.inspect(paths[-1])
    output = Path(arguments.output) if arguments.output else run_dir / f"{paths[-1].name}.safetensors"
    return inspection.consolidate(paths[-1], output)
