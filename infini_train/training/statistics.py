"""Gates and memory norms of all layers, gathered on every process."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from infini_train import platform
from infini_train.config import RunConfig
from infini_train.model.micro_batch import Memory
from infini_train.parallel.engine import Engine
from infini_train.parallel.layout import Layout


@torch.no_grad()
def memory_statistics(run: RunConfig, layout: Layout, engine: Engine, memory: Memory) -> dict[str, Any]:
    """A collective over all processes.

    Returns:
        gates: sigmoid(β) by layer and query head; memory_norm and memory_z_norm: Frobenius norm of M and norm of z by layer,
        mean over rows and key/value heads. Empty without memory.
    """
    model = run.model
    if model.attention != "infini":
        return {}
    heads = model.num_attention_heads // layout.tp_size
    table = torch.zeros(model.num_layers, model.num_attention_heads + 2, dtype=torch.float64, device=platform.device())
    for layer in engine.module.layers():
        gate = layer.self_attention.core_attention.attention.gate
        row = table[layer.layer_number - 1]
        with deepspeed.zero.GatheredParameters(gate, enabled=run.layout.zero_stage == 3):
            if layout.dp_rank == layout.cp_rank == 0:
                start = layout.tp_rank * heads
                row[start : start + heads] = torch.sigmoid(gate.detach().double())
        if layer.layer_number in memory and layout.cp_rank == 0:
            state = memory[layer.layer_number]
            row[-2] = state.M.double().flatten(2).norm(dim=-1).sum()
            row[-1] = state.z.double().norm(dim=-1).sum()
    dist.all_reduce(table)
    table[:, -2:] /= run.training.rows * model.num_query_groups
    return {
        "gates": [[round(value, 6) for value in row] for row in table[:, :-2].tolist()],
        "memory_norm": table[:, -2].tolist(),
        "memory_z_norm": table[:, -1].tolist(),
    }
