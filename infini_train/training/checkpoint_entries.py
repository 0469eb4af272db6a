"""The tensors of a checkpoint by their global names, as torch.distributed.checkpoint understands them.

Every tensor stands there with its slice of tensor parallelism and rows, so nothing depends on the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from infini_train import platform
from infini_train.model.parameters import ParameterPlacement


def shard(local: Tensor, groups: dict[int, Any]) -> Tensor:
    """A tensor split along some dimensions over process groups, as torch.distributed.checkpoint understands it.

    Args:
        groups: dimension -> group over which it is split in equal parts.
    """
    split = {dim: group for dim, group in groups.items() if dist.get_world_size(group) > 1}
    if not split:
        return local
    if len(split) == 1:
        mesh = DeviceMesh.from_group(next(iter(split.values())), local.device.type)
    else:
        ranks = _grid(*split.values())
        mesh = DeviceMesh.from_group(list(split.values()), local.device.type, mesh=ranks, mesh_dim_names=("a", "b"))
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
        return {f"{kind}.{placement.name}": shard(local, groups)}
    parts = local.chunk(placement.blocks, dim=placement.dim or 0)
    return {f"{kind}.{placement.name}.{index}": shard(part.contiguous(), groups) for index, part in enumerate(parts)}


def local_part(entry: Tensor) -> Tensor:
    """This process's part of an entry."""
    return entry.to_local() if isinstance(entry, DTensor) else entry


def empty_like_parameter(parameter: torch.nn.Parameter) -> Tensor:
    """An uninitialised float32 tensor with this process's slice of a parameter, whole under ZeRO-3 too."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.empty(shape, dtype=torch.float32, device=platform.device())


def optimizer_entries(
    placements: Mapping[str, ParameterPlacement], state: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Checkpoint entries of tensors that are given by kind ("model" or a moment) and by a parameter's name in its module."""
    entries: dict[str, Tensor] = {}
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            entries.update(_parameter_entries(placements[name], kind, tensor))
    return entries


def collect_blocks(
    placements: Mapping[str, ParameterPlacement], entries: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy fused matrices back from their blocks; other entries share their storage with `state` already."""
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            placement = placements[name]
            if placement.blocks > 1:
                parts = [local_part(entries[f"{kind}.{placement.name}.{i}"]) for i in range(placement.blocks)]
                tensor.copy_(torch.cat(parts, dim=placement.dim or 0))
