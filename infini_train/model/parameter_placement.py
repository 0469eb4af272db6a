"""Placement and initial value of every parameter, by its global name.

Each weight is drawn whole from a generator seeded by (seed, global name) and then sliced. A run therefore starts from the same
weights in every layout. Checkpoints use the same names and slices.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from infini_train.config import ModelConfig
from infini_train.model.stage import StageModel

# Dimension that tensor parallelism splits, and the number of blocks into which that dimension is divided first: SwiGLU's fc1
# holds gate and up, and each is split over the tensor-parallel group.
_SPLITS: dict[str, tuple[int, int]] = {
    "word_embeddings.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),
    "linear_fc2.weight": (1, 1),
    "output_layer.weight": (0, 1),
    "attention.gate": (0, 1),
    "attention.write_gate": (0, 1),
    "short_convolution.weight": (0, 1),
}
_REPLICATED = ("layernorm.weight", "memory_tokens")
_WRITES_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class ParameterPlacement:
    """Position of one parameter of this rank in the global model."""

    name: str
    """Global name: layers counted from 0 over all stages."""
    global_shape: tuple[int, ...]
    dim: int | None
    """Dimension split over the tensor-parallel group; None if replicated."""
    blocks: int
    """Number of blocks along `dim`, each split separately."""
    rank: int
    """This process's rank in the tensor-parallel group."""
    size: int
    """Size of the tensor-parallel group."""

    def slice(self, full: Tensor) -> Tensor:
        """Return this rank's slice of the global tensor."""
        if self.dim is None:
            return full
        slices = [block.chunk(self.size, dim=self.dim)[self.rank] for block in full.chunk(self.blocks, dim=self.dim)]
        return torch.cat(slices, dim=self.dim)


def _global_name(name: str, layer_offsets: Sequence[int]) -> str:
    _, chunk, name = name.split(".", 2)
    return re.sub(r"\blayers\.(\d+)\.", lambda match: f"layers.{int(match[1]) + layer_offsets[int(chunk)]}.", name)


def parameter_placements(module: StageModel, layer_offsets: Sequence[int]) -> dict[str, ParameterPlacement]:
    """Return the placement of every parameter, by its name in `module`.

    Args:
        layer_offsets: for each chunk of the module, the number of layers before it in the whole model.

    Raises:
        KeyError: a parameter has no declared split in this file.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    placements = {}
    for name, parameter in module.named_parameters():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        split = next((value for suffix, value in _SPLITS.items() if name.endswith(suffix)), None)
        if split is None and not name.endswith(_REPLICATED):
            raise KeyError(f"parameter {name} has no declared split over the tensor-parallel group")
        dim, blocks = split if split is not None else (None, 1)
        if dim is not None:
            shape[dim] *= size
        placements[name] = ParameterPlacement(_global_name(name, layer_offsets), tuple(shape), dim, blocks, rank, size)
    return placements


def initial_value(placement: ParameterPlacement, model: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of the global tensor, float32 on the CPU."""
    name = placement.name
    if name.endswith("layernorm.weight"):
        return torch.ones(placement.global_shape)
    if name.endswith("attention.gate"):
        return torch.full(placement.global_shape, float(model.initial_gate))
    if name.endswith("attention.write_gate"):
        return torch.zeros(placement.global_shape)
    std = model.init_std
    if name.endswith("short_convolution.weight"):
        std = placement.global_shape[-1] ** -0.5  # keeps the scale of queries and keys
    if name.endswith(_WRITES_RESIDUAL):
        std /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(placement.global_shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize_parameters(module: nn.Module, placements: dict[str, ParameterPlacement], model: ModelConfig, seed: int) -> None:
    """Draw every weight and set `tensor_model_parallel` on the parameters that are split over the tensor-parallel group.

    Megatron-core and DeepSpeed read that attribute to count replicated parameters once in the global gradient norm.
    """
    parameters = list(module.named_parameters())
    # One thread needs minutes for billions of values. Draw only a few tensors at a time, because each is drawn whole.
    threads = min(torch.get_num_threads(), 8)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(parameters), threads):
            several = parameters[start : start + threads]
            drawn = pool.map(lambda name: initial_value(placements[name], model, seed), [name for name, _ in several])
            for (name, parameter), value in zip(several, drawn, strict=True):
                parameter.copy_(placements[name].slice(value))
                parameter.tensor_model_parallel = placements[name].dim is not None  # type: ignore[attr-defined]
