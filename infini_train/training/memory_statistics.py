"""Statistics of gates, memory and memory gradients for all layers, gathered on every rank."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from infini_kernels import MemoryState
from infini_train.attention import without_tail
from infini_train.config import RunConfig
from infini_train.model.layer_context import Memory
from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.layout import Layout
from infini_train.runtime import platform


@torch.no_grad()
def memory_statistics(
    run: RunConfig, layout: Layout, engine: Engine, memory: Memory, gradient_squares: dict[int, Tensor]
) -> dict[str, Any]:
    """Compute the memory statistics of a step. A collective over all ranks.

    Args:
        memory: memory of this stage's layers.
        gradient_squares: `SegmentPipeline.memory_gradient_squares` of the last step.

    Returns:
        Empty for models without memory. Otherwise:

        - gates: sigmoid(β) by layer and query head.
        - memory_norm, memory_z_norm: Frobenius norm of M and L2 norm of z by layer, mean over rows and key/value heads.
        - memory_grad_norm: by layer, L2 norm over the step of the loss's gradient with respect to M and z at the borders
          between the micro-batches of a window. Only if a window has several micro-batches, and without context
          parallelism, where each rank holds only a share of this gradient.
    """
    model = run.model
    if model.attention != "infini":
        return {}
    heads = model.num_attention_heads // layout.tp_size
    table = torch.zeros(model.num_layers, model.num_attention_heads + 3, dtype=torch.float64, device=platform.device())
    for layer in engine.module.layers():
        gate = layer.self_attention.core_attention.attention.gate
        row = table[layer.layer_number - 1]
        with deepspeed.zero.GatheredParameters(gate, enabled=run.layout.zero_stage == 3):
            if layout.dp_rank == layout.cp_rank == 0:
                start = layout.tp_rank * heads
                row[start : start + heads] = torch.sigmoid(gate.detach().double())
        if layer.layer_number in memory and layout.cp_rank == 0:
            state = without_tail(memory[layer.layer_number])
            assert isinstance(state, MemoryState)
            row[-3] = state.M.double().flatten(2).norm(dim=-1).sum()
            row[-2] = state.z.double().norm(dim=-1).sum()
        # The loss of each rank is multiplied by their number, because DeepSpeed averages gradients.
        row[-1] = gradient_squares.get(layer.layer_number, 0.0) / layout.dp_size**2
    dist.all_reduce(table)
    table[:, -3:-1] /= run.training.rows * model.num_query_groups
    statistics = {
        "gates": [[round(value, 6) for value in row] for row in table[:, :-3].tolist()],
        "memory_norm": table[:, -3].tolist(),
        "memory_z_norm": table[:, -2].tolist(),
    }
    if run.training.micro_batches_per_window > 1 and layout.cp_size == 1:
        statistics["memory_grad_norm"] = table[:, -1].sqrt().tolist()
    return statistics
