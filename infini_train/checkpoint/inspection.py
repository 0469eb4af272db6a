"""`infini-train checkpoint list | verify | inspect | consolidate`: one process, no process group, no GPU."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from infini_train.checkpoint import folder
from infini_train.checkpoint.compatibility import split_block_name
from infini_train.checkpoint.reader import describe_tensors, read_whole
from infini_train.checkpoint.weights_file import SUFFIX, write_weights_file
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import check_writable, report_write_errors

DAMAGED_EXIT_CODE = 1


def list_all(run_dir: Path) -> int:
    """Print a table of all checkpoint folders of a run, including uncommitted ones."""
    root = folder.checkpoint_root(run_dir)
    folders = sorted(path for path in root.glob("step_*") if path.is_dir())
    if not folders:
        raise UserError(f"{root} holds no checkpoint; name a run directory with --run_dir, or train first")
    table = Table("checkpoint", "step", "tokens", "MB", "written", "state")
    for path in folders:
        facts, state = _describe_state(path)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(sep=" ", timespec="seconds")
        table.add_row(path.name, f"{facts.get('step', '')}", f"{facts.get('tokens', '')}", f"{size:,.1f}", written, state)
    Console().print(table)
    return 0


def _describe_state(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of state.json (empty if it cannot be used), and the folder's state for the table."""
    if path.suffix == folder.ASIDE:
        return {}, "set aside because it could not be read: delete it, or rename it back"
    if not folder.is_committed(path):
        return {}, "not committed: it will not be used"
    try:
        facts = folder.read_state_file(path)
    except UserError:
        return {}, f"damaged: {folder.STATE_FILE}; it will not be used"
    if wrong := _size_mismatches(path):
        return facts, f"damaged: {'; '.join(wrong)}; it will not be used"
    return facts, "committed"


def _size_mismatches(path: Path) -> list[str]:
    """Return one line for each file that is missing or whose size differs from the manifest.

    Only `verify` computes checksums, because reading all files takes long.
    """
    try:
        entries = folder.read_manifest(path)
    except UserError as error:
        return [str(error)]
    wrong = []
    for name, entry in sorted(entries.items()):
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}")
            continue
        if size != entry["bytes"]:
            wrong.append(f"{name} has {size} bytes instead of {entry['bytes']}")
    return wrong


def verify(paths: list[Path]) -> int:
    """Compare the checksums of all files with the manifest; return DAMAGED_EXIT_CODE if any checkpoint is damaged."""
    worst = 0
    for path in paths:
        wrong = folder.damage(path)
        print(f"{path}: " + ("whole" if not wrong else "DAMAGED: " + "; ".join(wrong)))
        worst = DAMAGED_EXIT_CODE if wrong else worst
    return worst


def inspect(path: Path) -> int:
    """Print a checkpoint's step, tokens, versions, configuration and tensors."""
    _refuse_damaged(path, by="inspect")
    facts = folder.read_state_file(path)
    print(f"{path}: step {facts['step']}, {facts['tokens']:,} tokens")
    print("written with", ", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    print("config", json.dumps(facts["config"]))
    table = Table("tensor", "shape", "type", "pieces")
    total = 0
    for name, entry in sorted(describe_tensors(path).items()):
        table.add_row(name, str(list(entry.size)), str(entry.properties.dtype).removeprefix("torch."), str(len(entry.chunks)))
        total += math.prod(entry.size) if name.startswith("model.") else 0
    Console(width=140).print(table)
    print(f"{total:,} parameters")
    return 0


def consolidate(path: Path, output: Path) -> int:
    """Write the model's full float32 weights to one safetensors file."""
    if output.suffix != SUFFIX:
        raise UserError(f"--output is {output}; give it a name that ends in {SUFFIX}, by which other commands know such files")
    if output.exists():
        raise UserError(f"--output {output} exists; name another file, or delete it")
    if not output.parent.is_dir():
        raise UserError(f"--output is {output}, but there is no folder {output.parent}; make it first")
    elsewhere = "free space there, or name a file elsewhere with --output"
    check_writable(output.parent, f"--output {output}", elsewhere)
    weights = read_model(path, by="consolidate")
    facts = folder.read_state_file(path)
    with report_write_errors(f"--output {output}", elsewhere, SafetensorError):
        write_weights_file(output, weights, facts)
    print(f"{output}: {sum(tensor.numel() for tensor in weights.values()):,} parameters of step {facts['step']}")
    return 0


def read_model(path: Path, by: str) -> dict[str, Tensor]:
    """Read the model's full weights, by global name.

    Args:
        by: name of the command that needs the weights, for the error message.

    Raises:
        UserError: the checkpoint is damaged.
    """
    _refuse_damaged(path, by)
    names = [name for name in describe_tensors(path) if name.startswith("model.")]
    return join_blocks({name.removeprefix("model."): tensor for name, tensor in read_whole(path, names).items()})


def join_blocks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join fused matrices (SwiGLU's gate and up), which a checkpoint stores as blocks NAME.0 and NAME.1."""
    joined: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        fused_name, number = split_block_name(name)
        joined.setdefault(fused_name, []).append((number, tensor))
    return {
        name: blocks[0][1] if len(blocks) == 1 else torch.cat([block for _, block in sorted(blocks, key=lambda pair: pair[0])])
        for name, blocks in joined.items()
    }


def _refuse_damaged(path: Path, by: str) -> None:
    wrong = folder.damage(path)
    if wrong:
        raise UserError(f"checkpoint {path}: {'; '.join(wrong)}; {by} another checkpoint")
