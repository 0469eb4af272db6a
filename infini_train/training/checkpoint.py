"""Sharded checkpoints through torch.distributed.checkpoint.

Every tensor stands under its global name with its slice of tensor parallelism and rows, so nothing in a checkpoint depends on
the layout that wrote it: float32 master weights, both Adam moments, the memory of every stream, and stream positions. A folder
`step_XXXXXXXX` gets its name only once all of its files are written.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from infini_train import platform
from infini_train.attention import LayerMemory
from infini_train.config import RunConfig
from infini_train.errors import UserError
from infini_train.model.micro_batch import Memory
from infini_train.model.parameters import ParameterPlacement
from infini_train.parallel.engine import Engine
from infini_train.parallel.layout import Layout
from infini_train.parallel.optimizer_state import MOMENTS, read_optimizer_state, write_optimizer_state
from infini_train.training.state import TrainingState

FORMAT_VERSION = 1
_STATE_FILE = "state.json"


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    root = checkpoint_root(run_dir)
    found = [path for path in root.glob("step_*") if path.suffix != ".partial" and (path / _STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_state_file(path: Path) -> dict[str, Any]:
    """Step, tokens, configuration and tokenizer fingerprint of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}: {_STATE_FILE} cannot be read ({error}); delete the folder to use an older one"
        ) from error


def _shard(local: Tensor, groups: dict[int, Any]) -> Tensor:
    """A tensor split along some dimensions over process groups, as torch.distributed.checkpoint understands it.

    Args:
        groups: dimension -> group over which it is split in equal parts.
    """
    split = {dim: group for dim, group in groups.items() if dist.get_world_size(group) > 1}
    if not split:
        return local
    if len(split) == 1:
        mesh = DeviceMesh.from_group(next(iter(split.values())), platform.device().type)
    else:
        ranks = _grid(*split.values())
        mesh = DeviceMesh.from_group(list(split.values()), platform.device().type, mesh=ranks, mesh_dim_names=("a", "b"))
    return DTensor.from_local(local, mesh, [Shard(dim) for dim in split], run_check=False)


def _grid(outer: Any, inner: Any) -> Tensor:
    """Ranks of the processes that hold the parts of one tensor: [outer, inner]."""
    mine: list[Any] = [None] * dist.get_world_size(outer)
    dist.all_gather_object(mine, dist.get_process_group_ranks(inner), group=outer)
    return torch.tensor(mine, dtype=torch.int)


def _parameter_entries(placement: ParameterPlacement, kind: str, local: Tensor) -> dict[str, Tensor]:
    """Checkpoint entries of one parameter; a fused matrix (SwiGLU's gate and up) is one entry a block."""
    groups = {} if placement.dim is None else {placement.dim: parallel_state.get_tensor_model_parallel_group()}
    if placement.blocks == 1:
        return {f"{kind}.{placement.name}": _shard(local, groups)}
    parts = local.chunk(placement.blocks, dim=placement.dim or 0)
    return {f"{kind}.{placement.name}.{index}": _shard(part.contiguous(), groups) for index, part in enumerate(parts)}


def _local(entry: Tensor) -> Tensor:
    return entry.to_local() if isinstance(entry, DTensor) else entry


class Checkpointer:
    """Saves and loads one run.

    Args:
        placements: of the engine's parameters, by module name.
        tokenizer_fingerprint: written beside the weights, and compared when they are loaded.
    """

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        placements: dict[str, ParameterPlacement],
        tokenizer_fingerprint: str,
    ) -> None:
        self.run, self.layout, self.placements = run, layout, placements
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.run_dir = Path(run.run_dir)

    def save(self, engine: Engine, state: TrainingState) -> Path:
        """Write the state after `state.step` steps; a collective over all processes."""
        final = checkpoint_root(self.run_dir) / f"step_{state.step:08d}"
        partial = final.with_suffix(".partial")
        if self.layout.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(
            {**self._optimizer_entries(read_optimizer_state(engine)), **self._stream_entries(state)},
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
        )
        if self.layout.is_main:
            facts = {
                "format_version": FORMAT_VERSION,
                "step": state.step,
                "tokens": state.tokens,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "config": asdict(self.run),
            }
            (partial / _STATE_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            for old in list_checkpoints(self.run_dir)[: -self.run.checkpoint.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load(self, path: Path, engine: Engine, state: TrainingState) -> None:
        """Restore weights, optimizer, memory and stream positions into a fresh engine and state.

        Raises:
            UserError: the checkpoint belongs to another model, tokenizer or number of rows.
        """
        facts = self._read_facts(path)
        optimizer = {
            kind: {name: self._empty(name, parameter) for name, parameter in engine.module.named_parameters()}
            for kind in ("model", *MOMENTS)
        }
        state.memory = self._empty_memory()
        entries = {**self._optimizer_entries(optimizer), **self._stream_entries(state)}
        _read(path, entries)
        self._collect_blocks(entries, optimizer)
        write_optimizer_state(engine, optimizer, facts["step"])
        state.memory = {
            layer: LayerMemory(_local(entries[f"memory.M.{layer}"]), _local(entries[f"memory.z.{layer}"]))
            for layer in state.memory
        }
        state.reader.load_state(_local(entries["streams"]).cpu())
        state.step, state.tokens = facts["step"], facts["tokens"]

    def load_weights(self, path: Path, module: torch.nn.Module) -> int:
        """Restore weights alone, in any layout; returns the checkpoint's step.

        Raises:
            UserError: the checkpoint belongs to another model or tokenizer.
        """
        facts = self._read_facts(path)
        weights = {"model": {name: self._empty(name, parameter) for name, parameter in module.named_parameters()}}
        entries = self._optimizer_entries(weights)
        _read(path, entries)
        self._collect_blocks(entries, weights)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights["model"][name])
        return facts["step"]

    def _read_facts(self, path: Path) -> dict[str, Any]:
        facts = read_state_file(path)
        if facts["tokenizer_fingerprint"] != self.tokenizer_fingerprint:
            raise UserError(
                f"checkpoint {path} was trained with tokenizer {facts['tokenizer_fingerprint'][:12]}, but data.path "
                f"{self.run.data.path} holds {self.tokenizer_fingerprint[:12]}; use the data that the run was started with"
            )
        saved, ours = facts["config"]["model"], asdict(self.run)["model"]
        for key, value in ours.items():
            if saved.get(key) != value:
                raise UserError(
                    f"model.{key} is {value}, but checkpoint {path} was trained with {saved.get(key)}; "
                    "set it back, or choose a new run_dir"
                )
        if facts["config"]["training"]["rows"] != self.run.training.rows:
            raise UserError(
                f"training.rows is {self.run.training.rows}, but checkpoint {path} was trained with "
                f"{facts['config']['training']['rows']} rows; set it back, or choose a new run_dir"
            )
        return facts

    def _empty(self, name: str, parameter: torch.nn.Parameter) -> Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return torch.empty(shape, dtype=torch.float32, device=platform.device())

    def _optimizer_entries(self, state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        entries: dict[str, Tensor] = {}
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                entries.update(_parameter_entries(self.placements[name], kind, tensor))
        return entries

    def _collect_blocks(self, entries: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> None:
        """Copy fused matrices back from their blocks; other entries share their storage with `state` already."""
        for kind, tensors in state.items():
            for name, tensor in tensors.items():
                placement = self.placements[name]
                if placement.blocks > 1:
                    parts = [_local(entries[f"{kind}.{placement.name}.{i}"]) for i in range(placement.blocks)]
                    tensor.copy_(torch.cat(parts, dim=placement.dim or 0))

    def _stream_entries(self, state: TrainingState) -> dict[str, Tensor]:
        rows = parallel_state.get_data_parallel_group()
        heads = parallel_state.get_tensor_model_parallel_group()
        positions = state.reader.state().to(platform.device())
        entries = {"streams": _shard(positions, {0: rows})}
        for layer, memory in sorted(state.memory.items()):
            entries[f"memory.M.{layer}"] = _shard(memory.M.contiguous(), {0: rows, 1: heads})
            entries[f"memory.z.{layer}"] = _shard(memory.z.contiguous(), {0: rows, 1: heads})
        return entries

    def _empty_memory(self) -> Memory:
        model = self.run.model
        if model.attention != "infini":
            return {}
        rows = len(self.layout.rows(self.run.training.rows))
        groups, width = model.num_query_groups // self.layout.tp_size, model.head_dim
        layers = [layer + 1 for chunk in self.layout.layers(model.num_layers) for layer in chunk]
        device = platform.device()
        return {
            layer: LayerMemory(
                torch.zeros(rows, groups, width, width, device=device), torch.zeros(rows, groups, width, device=device)
            )
            for layer in layers
        }


def _read(path: Path, entries: dict[str, Tensor]) -> None:
    try:
        dcp.load(entries, storage_reader=dcp.FileSystemReader(path))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read: {first}; delete the folder to use an older one") from error
