"""Save a run's state to a checkpoint and load it.

A checkpoint holds float32 master weights, both Adam moments, the memory of every stream, and the stream positions. Each
tensor is stored under its global name, with its slice of the tensor-parallel dimension and of the rows. So a checkpoint does
not depend on the layout that wrote it. `infini_train.checkpoint` writes and reads the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from infini_train import __version__
from infini_train.attention import CarriedTensor, carried_fields, map_tensors
from infini_train.checkpoint import folder
from infini_train.checkpoint.compatibility import check_same_model
from infini_train.checkpoint.reader import read_tensors
from infini_train.checkpoint.tensors import collect_blocks, empty_like_parameter, local_slice, optimizer_entries, shard
from infini_train.checkpoint.training_state import TrainingState
from infini_train.checkpoint.writer import CheckpointWriter
from infini_train.config import RunConfig, TrainingConfig
from infini_train.model.layer_context import Memory, empty_memory
from infini_train.model.parameter_placement import ParameterPlacement
from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.deepspeed.optimizer_state import MOMENTS, read_optimizer_state, write_optimizer_state
from infini_train.parallel.layout import Layout
from infini_train.runtime import platform
from infini_train.runtime.errors import AgreedError, UserError


class Checkpointer:
    """Saves and loads one run.

    Args:
        placements: placements of the engine's parameters, by name in the module.
        tokenizer_fingerprint: saved with the weights, and compared when they are loaded.
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
        self.writer = CheckpointWriter(Path(run.run_dir), run.checkpoint, layout.is_main)

    def save(self, engine: Engine, state: TrainingState) -> None:
        """Start to save the state after `state.step` steps. A collective over all ranks; see `CheckpointWriter.save`."""
        self.writer.save(state.step, lambda: self._stage(engine, state), self._facts(state))

    def finish(self, *, must_succeed: bool = False) -> Path | None:
        """Wait for the save in progress. See `CheckpointWriter.finish`."""
        return self.writer.finish(must_succeed=must_succeed)

    def _stage(self, engine: Engine, state: TrainingState) -> dict[str, Tensor]:
        """Copy this rank's share of the state to host memory.

        Ranks that hold the same weights (data and context parallel) divide them among themselves. So a rank copies 12 bytes per
        parameter of its tensor and pipeline slice, divided by the number of those ranks, and the memory of its streams.
        """
        weights = read_optimizer_state(engine, keep=self._own_parameters(engine))
        memory = {layer: map_tensors(_copy, each) for layer, each in state.memory.items()}
        return {**optimizer_entries(self.placements, weights), **self._stream_entries(state.reader.state(), memory)}

    def _own_parameters(self, engine: Engine) -> set[str]:
        """Return the names of the parameters that this rank writes.

        Parameters are assigned greedily, largest first, so that all replicas write about the same number of values.
        """
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        load = [0] * dist.get_world_size(replicas)
        mine = set()
        sizes = {
            name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in engine.module.named_parameters()
        }
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            owner = load.index(min(load))
            load[owner] += size
            if owner == dist.get_rank(replicas):
                mine.add(name)
        return mine

    def _facts(self, state: TrainingState) -> dict[str, Any]:
        return {
            "step": state.step,
            "tokens": state.tokens,
            "health": state.health.state_dict(),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "dataset_fingerprint": state.reader.dataset.fingerprint,
            "config": asdict(self.run),
            "versions": {
                # Not from package metadata, which a source tree on PYTHONPATH does not have.
                "infini-train": __version__,
                **{name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
            },
        }

    def load(self, path: Path, engine: Engine, state: TrainingState) -> None:
        """Restore weights, optimizer, memory and stream positions into a fresh engine and state.

        Raises:
            UserError: the checkpoint belongs to another model, tokenizer, data set or order of the data.
        """
        facts = folder.read_state_file(path)
        check_same_model(facts, path, self.run, self.tokenizer_fingerprint)
        self._check_streams(facts, path, state)
        state.health.load_state_dict(facts["health"])
        for kind in (*MOMENTS, "model"):
            self._load_kind(kind, path, engine, facts["step"] - state.health.skipped_steps)
        memory = self._empty_memory()
        entries = self._stream_entries(state.reader.state(), memory)
        read_tensors(path, entries)
        state.memory = {
            layer: type(each)(*(local_slice(entries[f"memory.{field}.{layer}"]) for field in self._carried(layer)))
            for layer, each in memory.items()
        }
        state.reader.load_state(local_slice(entries["streams"]))
        torch.set_rng_state(entries["random.torch"])
        state.step, state.tokens = facts["step"], facts["tokens"]

    def _load_kind(self, kind: str, path: Path, engine: Engine, steps_taken: int) -> None:
        """Load the weights or one of the moments.

        Loading one kind at a time needs only 4 bytes per parameter of this rank's slice beside the engine.
        """
        tensors = {kind: {name: empty_like_parameter(each) for name, each in engine.module.named_parameters()}}
        entries = optimizer_entries(self.placements, tensors)
        read_tensors(path, entries)
        collect_blocks(self.placements, entries, tensors)
        write_optimizer_state(engine, tensors, steps_taken)

    def _check_streams(self, facts: dict[str, Any], path: Path, state: TrainingState) -> None:
        """Refuse a checkpoint of other documents or another order: its stream positions and memories do not apply to this run.

        Raises:
            UserError: a key of `training` or the data set differs.
        """
        # The checkpoint may be older than a key; the run then had the key's default.
        before = {**asdict(TrainingConfig()), **facts["config"]["training"]}
        for key in ("rows", "seed", "length_curriculum", "initial_weights"):
            ours, saved = getattr(self.run.training, key), before[key]
            if saved != ours:
                raise UserError(
                    f"training.{key} is {ours}, but checkpoint {path} was trained with {saved}; "
                    "set it back, or choose a new run_dir"
                )
        if facts.get("dataset_fingerprint", state.reader.dataset.fingerprint) != state.reader.dataset.fingerprint:
            raise UserError(
                f"data.path {self.run.data.path} holds other documents than those that checkpoint {path} was trained on; "
                "use the data that the run was started with, or choose a new run_dir"
            )

    def _stream_entries(self, positions: Tensor, memory: Memory) -> dict[str, Tensor]:
        rows = parallel_state.get_data_parallel_group()
        heads = parallel_state.get_tensor_model_parallel_group()
        entries = {"streams": shard(positions, {0: rows}), "random.torch": torch.get_rng_state()}
        for layer, each in sorted(memory.items()):
            for (field, carried), tensor in zip(self._carried(layer).items(), each, strict=True):
                groups = {0: rows, 1: heads} if carried.by_head else {0: rows}
                entries[f"memory.{field}.{layer}"] = shard(tensor.contiguous(), groups)
        return entries

    def _carried(self, layer: int) -> dict[str, CarriedTensor]:
        return carried_fields(self.run.model, layer)

    def _empty_memory(self) -> Memory:
        model, rows = self.run.model, len(self.layout.rows(self.run.training.rows))
        layers = (layer + 1 for chunk in self.layout.layers(model.num_layers) for layer in chunk)
        return empty_memory(model, layers, rows, self.layout.tp_size, platform.device())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def newest_checkpoint(run_dir: Path, on_damage: Callable[[str], None]) -> Path | None:
    """Find the newest intact checkpoint. A collective over all ranks, which divide the files among themselves.

    Args:
        on_damage: called with one line for each newer checkpoint that is damaged.

    Returns:
        The checkpoint's folder; None if the run has no checkpoint.

    Raises:
        AgreedError: the run has checkpoints, but none is intact. A user must decide whether to start from scratch.
    """
    chosen: list[Any] = [[str(path) for path in reversed(folder.list_checkpoints(run_dir))]]
    dist.broadcast_object_list(chosen, src=0)  # other nodes may see a cached, older listing
    newest_wrong: str | None = None
    for path in map(Path, chosen[0]):
        if not (wrong := find_damage(path)):
            return path
        newest_wrong = newest_wrong or f"{path.name}: {'; '.join(wrong)}"
        on_damage(f"checkpoint {path} is damaged: {'; '.join(wrong)}; taking the one before it")
    if newest_wrong is not None:
        raise AgreedError(
            f"run_dir {run_dir}: of its {len(chosen[0])} checkpoint(s) none can be read ({newest_wrong}); repair the storage, "
            f"or move {folder.checkpoint_root(run_dir)} away to start from scratch"
        )
    return None


def find_damage(path: Path) -> list[str]:
    """Return one line for each damaged file of a committed checkpoint.

    A collective over all ranks, which divide the files among themselves.
    """
    try:
        files = sorted(folder.read_manifest(path).items())
        mine = files[dist.get_rank() :: dist.get_world_size()]
        wrong = [found for name, entry in mine if (found := folder.damaged_file(path, name, entry)) is not None]
    except UserError as error:
        wrong = [str(error)]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    return [line for of_rank in everywhere for line in of_rank]
