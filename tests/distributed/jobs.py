"""What the ranks of a test run. Results are plain numbers and CPU tensors with the place they hold in the global tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infini_train.config import RunConfig
from infini_train.evaluation.generation import StreamingModel
from infini_train.model import MicroBatch
from infini_train.training.checkpoint import list_checkpoints
from infini_train.training.loop import train_step
from infini_train.training.setup import Parts, build_parts
from infini_train.training.signals import StopRequest


def train(run: RunConfig, steps: int) -> dict[str, Any]:
    """Train some steps; loss and gradient norm of each, and this rank's slices of weights and memory."""
    parts = build_parts(run)
    initial = _weights(parts)
    records = [train_step(parts, StopRequest())[0] for _ in range(steps)]
    return {
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "initial": initial,
        "weights": _weights(parts),
        "memory": _memory(parts),
        "positions": (parts.layout.dp_rank, parts.state.reader.state()),
    }


def _weights(parts: Parts) -> dict[str, tuple[int | None, int, int, Tensor]]:
    """Global name -> (split dimension, blocks, tensor rank, local float32 slice)."""
    state = parts.engine.module.named_parameters()
    placements = parts.checkpointer.placements
    if parts.run.layout.zero_stage == 3:
        import deepspeed

        slices = {}
        for name, parameter in state:
            with deepspeed.zero.GatheredParameters(parameter):
                slices[name] = parameter.detach().clone().float()
    else:
        slices = {name: parameter.detach().clone().float() for name, parameter in state}
    return {
        placements[name].name: (placements[name].dim, placements[name].blocks, placements[name].rank, value)
        for name, value in slices.items()
    }


def _memory(parts: Parts) -> dict[int, tuple[int, int, Tensor, Tensor]]:
    """Layer -> (data-parallel rank, tensor rank, M, z)."""
    layout = parts.layout
    return {layer: (layout.dp_rank, layout.tp_rank, state.M, state.z) for layer, state in parts.state.memory.items()}


def streaming_logits(run: RunConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of a document read in odd chunks with constant memory, and of one pass over all of it."""
    parts = build_parts(run)
    for _ in range(3):
        train_step(parts, StopRequest())
    module = parts.engine.module.eval()
    stream = StreamingModel(module, run)
    pieces, start, sizes = [], 0, [37, 1, 1, 100, 5]
    while start < tokens.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces += [logits[0] for logits in stream.feed(tokens[:, start : start + size])]
        start += size
    segments = -(-tokens.shape[1] // run.model.segment_length)
    lengths = torch.full((1, segments), run.model.segment_length)
    lengths[0, -1] = tokens.shape[1] - (segments - 1) * run.model.segment_length
    reset = torch.zeros(1, segments, dtype=torch.bool)
    reset[0, 0] = True
    with torch.no_grad():
        whole = module(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            packed_seq_params=MicroBatch(reset=reset, lengths=lengths),
            runtime_gather_output=True,
        )
    return torch.cat(pieces), whole[0].float()


def save_after(run: RunConfig, steps: int, more: int) -> dict[str, Any]:
    """Train, save, and train some more steps: what a resumed run must repeat."""
    parts = build_parts(run)
    for _ in range(steps):
        train_step(parts, StopRequest())
    parts.checkpointer.save(parts.engine, parts.state)
    return _continue(parts, more)


def load_and_train(run: RunConfig, steps: int) -> dict[str, Any]:
    """Load the newest checkpoint of the run directory into this layout and train."""
    parts = build_parts(run)
    parts.checkpointer.load(list_checkpoints(Path(run.run_dir))[-1], parts.engine, parts.state)
    return _continue(parts, steps)


def _continue(parts: Parts, steps: int) -> dict[str, Any]:
    records = [train_step(parts, StopRequest())[0] for _ in range(steps)]
    return {
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "weights": _weights(parts),
    }
