"""Build the state dict for torch.distributed.checkpoint: checkpoint entries by global name.

Each entry records which slice of the tensor-parallel dimension and of the rows a rank holds. So a checkpoint does not depend
on the layout that wrote it.
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

from infini_train.model.parameter_placement import ParameterPlacement
from infini_train.runtime import platform


def shard(local: Tensor, groups: dict[int, Any]) -> Tensor:
    """Wrap this rank's slice of a tensor in a DTensor.

    Args:
        local: this rank's slice.
        groups: dimension -> process group over which that dimension is split evenly.

    Returns:
        A DTensor; `local` itself if no group has more than one rank.
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
    """Return the ranks that hold the slices of one tensor: [outer, inner]."""
    mine: list[Any] = [None] * dist.get_world_size(outer)
    dist.all_gather_object(mine, dist.get_process_group_ranks(inner), group=outer)
    return torch.tensor(mine, dtype=torch.int)


def _parameter_entries(placement: ParameterPlacement, kind: str, local: Tensor) -> dict[str, Tensor]:
    """Return the checkpoint entries of one parameter; a fused matrix (SwiGLU's gate and up) has one entry per block."""
    groups = {} if placement.dim is None else {placement.dim: parallel_state.get_tensor_model_parallel_group()}
    if placement.blocks == 1:
        return {f"{kind}.{placement.name}": shard(local, groups)}
    blocks = local.chunk(placement.blocks, dim=placement.dim or 0)
    return {f"{kind}.{placement.name}.{index}": shard(block.contiguous(), groups) for index, block in enumerate(blocks)}


def local_slice(entry: Tensor) -> Tensor:
    """Return this rank's slice of a checkpoint entry."""
    return entry.to_local() if isinstance(entry, DTensor) else entry


def empty_like_parameter(parameter: torch.nn.Parameter) -> Tensor:
    """Create an uninitialised float32 tensor for this rank's slice of a parameter; not partitioned under ZeRO-3 either."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.empty(shape, dtype=torch.float32, device=platform.device())


def optimizer_entries(
    placements: Mapping[str, ParameterPlacement], state: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the checkpoint entries of weights and moments.

    Args:
        state: tensors by kind ("model" or a moment) and by the parameter's name in its module.
    """
    entries: dict[str, Tensor] = {}
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            entries.update(_parameter_entries(placements[name], kind, tensor))
    return entries


def collect_blocks(
    placements: Mapping[str, ParameterPlacement], entries: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy fused matrices from the entries of their blocks into `state`. Other entries share storage with `state` already."""
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            placement = placements[name]
            if placement.blocks > 1:
                blocks = [local_slice(entries[f"{kind}.{placement.name}.{i}"]) for i in range(placement.blocks)]
                tensor.copy_(torch.cat(blocks, dim=placement.dim or 0))
