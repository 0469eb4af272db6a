"""What a checkpoint holds, and how it gets in and out of a run.

Every tensor stands under its global name with its slice of tensor parallelism and rows, so nothing in a checkpoint depends on
the layout that wrote it: float32 master weights, both Adam moments, the memory of every stream, and stream positions.
`infini_train.checkpoint` brings them to the disk and back.
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

from infini_train import __version__, platform
from infini_train.attention import CarriedTensor, carried_fields, map_parts
from infini_train.checkpoint import folder
from infini_train.checkpoint.compatibility import check_same_model
from infini_train.checkpoint.reader import read_tensors
from infini_train.checkpoint.writer import CheckpointWriter
from infini_train.config import RunConfig, TrainingConfig
from infini_train.errors import AgreedError, UserError
from infini_train.model.micro_batch import Memory, empty_memory
from infini_train.model.parameters import ParameterPlacement
from infini_train.parallel.engine import Engine
from infini_train.parallel.layout import Layout
from infini_train.parallel.optimizer_state import MOMENTS, read_optimizer_state, write_optimizer_state
from infini_train.training.checkpoint_entries import (
    collect_blocks,
    empty_like_parameter,
    local_part,
    optimizer_entries,
    shard,
)
from infini_train.training.state import TrainingState


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
        self.writer = CheckpointWriter(Path(run.run_dir), run.checkpoint, layout.is_main)

    def save(self, engine: Engine, state: TrainingState) -> None:
        """Begin to save the state after `state.step` steps; a collective over all processes. See `CheckpointWriter.save`."""
        self.writer.save(state.step, lambda: self._staged(engine, state), self._facts(state))

    def finish(self, *, must_succeed: bool = False) -> Path | None:
        """Wait until what was begun is on the disk. See `CheckpointWriter.finish`."""
        return self.writer.finish(must_succeed=must_succeed)

    def _staged(self, engine: Engine, state: TrainingState) -> dict[str, Tensor]:
        """What this process writes, copied to host memory.

        Processes that hold the same weights (data and context parallel) divide them, so that no process's copy is larger than
        its share: 12 bytes a parameter of its tensor and pipeline slice, divided by those processes, and its streams' memory.
        """
        weights = read_optimizer_state(engine, keep=self._own_parameters(engine))
        memory = {layer: map_parts(_copy, each) for layer, each in state.memory.items()}
        return {**optimizer_entries(self.placements, weights), **self._stream_entries(state.reader.state(), memory)}

    def _own_parameters(self, engine: Engine) -> set[str]:
        """Names of the parameters that this process writes: about equal parts, the largest first."""
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
                # Not from the installed packages: a source tree on PYTHONPATH is none.
                "infini-train": __version__,
                **{name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
            },
        }

    def load(self, path: Path, engine: Engine, state: TrainingState) -> None:
        """Restore weights, optimizer, memory and stream positions into a fresh engine and state.

        Raises:
            UserError: the checkpoint belongs to another model or tokenizer, or its stream positions mean nothing here.
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
            layer: type(each)(*(local_part(entries[f"memory.{field}.{layer}"]) for field in self._carried(layer)))
            for layer, each in memory.items()
        }
        state.reader.load_state(local_part(entries["streams"]))
        torch.set_rng_state(entries["random.torch"])
        state.step, state.tokens = facts["step"], facts["tokens"]

    def _load_kind(self, kind: str, path: Path, engine: Engine, steps_taken: int) -> None:
        """Weights, or one of the moments: one alone takes 4 bytes a parameter of this process's slice beside the engine."""
        tensors = {kind: {name: empty_like_parameter(each) for name, each in engine.module.named_parameters()}}
        entries = optimizer_entries(self.placements, tensors)
        read_tensors(path, entries)
        collect_blocks(self.placements, entries, tensors)
        write_optimizer_state(engine, tensors, steps_taken)

    def _check_streams(self, facts: dict[str, Any], path: Path, state: TrainingState) -> None:
        """Positions in streams and the memories beside them belong to one order of one set of documents."""
        # A key that is newer than the checkpoint had its default.
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
            for (field, carried), part in zip(self._carried(layer).items(), each, strict=True):
                groups = {0: rows, 1: heads} if carried.by_head else {0: rows}
                entries[f"memory.{field}.{layer}"] = shard(part.contiguous(), groups)
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
    """The newest checkpoint whose files are whole; a collective over all processes, which divide the reading.

    Args:
        on_damage: called with one line for each newer one that is not.

    Returns:
        None if there is no checkpoint.

    Raises:
        AgreedError: there are some, and none is whole: to begin anew is for a person to decide.
    """
    chosen: list[Any] = [[str(path) for path in reversed(folder.list_checkpoints(run_dir))]]
    dist.broadcast_object_list(chosen, src=0)  # one view of a shared folder, which may be cached differently elsewhere
    newest_wrong: str | None = None
    for path in map(Path, chosen[0]):
        if not (wrong := damage_in_shares(path)):
            return path
        newest_wrong = newest_wrong or f"{path.name}: {'; '.join(wrong)}"
        on_damage(f"checkpoint {path} is damaged: {'; '.join(wrong)}; taking the one before it")
    if newest_wrong is not None:
        raise AgreedError(
            f"run_dir {run_dir}: of its {len(chosen[0])} checkpoint(s) none can be read ({newest_wrong}); mend the storage, or "
            f"move {folder.checkpoint_root(run_dir)} away to begin anew"
        )
    return None


def damage_in_shares(path: Path) -> list[str]:
    """What is wrong with the files of a committed checkpoint; a collective over all processes, which divide the reading."""
    try:
        files = sorted(folder.read_manifest(path).items())
        mine = files[dist.get_rank() :: dist.get_world_size()]
        wrong = [found for name, entry in mine if (found := folder.damaged_file(path, name, entry)) is not None]
    except UserError as error:
        wrong = [str(error)]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    return [line for part in everywhere for line in part]
