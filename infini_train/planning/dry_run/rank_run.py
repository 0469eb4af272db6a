"""Dry run of one rank of a large job in this process, with meta tensors and torch's fake process group.

The dry run executes the real code: process groups, model, DeepSpeed engine and optimizer, pipeline schedule and transport,
the forward and backward pass of every micro-batch, and the optimizer step. Tensors have shapes but no values. Messages have
sizes but no receiver. Softmax attention uses the flash attention that torch runs on a GPU; norms run as on a CPU.

The dry run does not cover data loading, initialization, evaluation, checkpoints, workspaces of fused GPU kernels, or timing.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infini_kernels import softmax_attention
from infini_train.config import RunConfig
from infini_train.planning.dry_run.recorded_operations import Message, Observer, tensor_bytes
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError

META = torch.device("meta")


class MetaObserver(Observer):
    """Observer that returns 0 when the code reads the value of a meta tensor, such as a loss or a norm."""

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0.0
        return super().compute(func, args, kwargs)


class FlashAttention:
    """Replacement for the module `flash_attn`. Without it, torch would not select a fused kernel for meta tensors."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, deterministic: bool) -> Tensor:
        """q [X, T, H, D], k and v [X, T, G, D] -> [X, T, H, D]"""
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, causal, scale=softmax_scale)[0]
        return out.transpose(1, 2)


@dataclass
class DryRun:
    """Observations of one rank in one step."""

    stage: int
    parameters: dict[str, tuple[int, ...]]
    """Global parameter name -> shape on this rank."""
    weights: int
    """Bytes."""
    gradients: int
    """Bytes."""
    optimizer: int
    """Bytes."""
    in_flight: int
    """Largest number of micro-batches between forward and backward, counted once per chunk."""
    activations: int
    """Bytes of activations of the micro-batches in flight, at the maximum."""
    memory_states: int
    """Bytes of memory states of the micro-batches in flight, at the maximum."""
    peak: int
    """Largest number of live bytes before the optimizer step."""
    messages: list[Message] = field(default_factory=list)
    """Messages of the step, without those of DeepSpeed's initialization."""


@contextmanager
def meta_process(rank: int, processes: int) -> Iterator[None]:
    """Make this process one rank of a job on the device `meta`.

    This replaces functions of torch, DeepSpeed and this package, so the process cannot be used for anything else afterwards.

    Args:
        rank: rank of this process.
        processes: number of processes in the job.

    Raises:
        UserError: this process already belongs to a job.
    """
    if dist.is_initialized():
        raise UserError("--dry_run needs a process of its own; call `infini-train plan` without a launcher")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.has_cuda = lambda: False
    platform.install()
    from deepspeed.accelerator import get_accelerator

    accelerator, autocast = get_accelerator(), torch.is_autocast_enabled
    # Megatron-core allocates weights and buffers on the current CUDA device; this package allocates on `platform.device`.
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    platform.device = lambda: META
    # DeepSpeed allocates buffers on the device of its accelerator and rejects parameters on other devices.
    accelerator.device_name = lambda *_: "meta"
    accelerator.current_device_name = lambda: "meta"
    accelerator.on_accelerator = lambda tensor: tensor.is_meta
    # Activation checkpointing and the kernels query autocast, and torch raises for the device type "meta".
    torch.is_autocast_enabled = lambda kind="cuda": False if kind == "meta" else autocast(kind)
    # On a GPU, flash attention does not store the score matrix, so the dry run must not count one.
    softmax_attention.flash_attention_for = lambda *_: FlashAttention  # type: ignore[assignment]
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(processes))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    quiet = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        yield


def dry_run(run: RunConfig, processes: int, rank: int) -> DryRun:
    """Run one training step of one rank. A process can call this once.

    Args:
        run: a valid run.
        processes: number of processes in the job.
        rank: rank to run, less than `processes`.

    Raises:
        UserError: this process already belongs to a job.
    """
    with meta_process(rank, processes):
        return _step(run)


def _step(run: RunConfig) -> DryRun:
    from infini_train.model.gpt import build_stage
    from infini_train.model.parameter_placement import parameter_placements
    from infini_train.parallel.deepspeed.engine import Engine
    from infini_train.parallel.deepspeed.optimizer_state import initialize_moments
    from infini_train.parallel.layout import initialize_layout
    from infini_train.parallel.pipeline import SegmentPipeline
    from infini_train.planning.dry_run.engine_tensors import gradient_tensors, optimizer_tensors, weight_tensors
    from infini_train.planning.dry_run.live_tensors import KeptTensors

    layout = initialize_layout(run)
    rows = len(layout.rows(run.training.rows))
    module = build_stage(run, layout.pp_rank)
    placements = parameter_placements(module, layout.layer_offsets(run.model.num_layers))
    for name, parameter in module.named_parameters():
        parameter.tensor_model_parallel = placements[name].dim is not None  # type: ignore[attr-defined]
    with MetaObserver():
        engine = Engine(module, run, rows)
        initialize_moments(engine)
    pipeline = SegmentPipeline(engine, run, layout, rows)
    weights, optimizer = [*weight_tensors(engine)], [*optimizer_tensors(engine)]
    batches = [_batch(run, rows, layout.cp_size) for _ in range(run.micro_batches_per_step)]
    kept = KeptTensors(pipeline)
    with MetaObserver([*weights, *optimizer, *gradient_tensors(engine)]) as observer:
        pipeline.forward_backward(batches, _memory(run, pipeline, rows, layout.tp_size), loss_scale=1.0)
        peak, gradients = observer.peak, tensor_bytes(gradient_tensors(engine))
        engine.step(0)
    return DryRun(
        stage=layout.pp_rank,
        parameters={placements[name].name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
        weights=tensor_bytes(weights),
        gradients=gradients,
        optimizer=tensor_bytes(optimizer),
        in_flight=kept.max_in_flight,
        activations=kept.max_activation_bytes,
        memory_states=kept.max_state_bytes,
        peak=peak,
        messages=observer.messages,
    )


def _memory(run: RunConfig, pipeline: Any, rows: int, tensor_processes: int) -> Any:
    """Return memory states as a previous step would leave them."""
    if run.model.attention != "infini":
        return {}
    from infini_train.model.layer_context import empty_memory

    return empty_memory(run.model, sorted(set().union(*pipeline.chunk_layers)), rows, tensor_processes, META)


def _batch(run: RunConfig, rows: int, context_processes: int) -> Any:
    """Return a micro-batch without padding from the middle of a document. Its token values have no effect."""
    from infini_train.data.streams import Batch

    segments = run.training.segments_per_micro_batch // context_processes
    tokens = torch.zeros(rows, segments * run.model.segment_length, dtype=torch.int64)
    return Batch(
        tokens=tokens,
        targets=tokens,
        loss_mask=torch.ones(tokens.shape),
        lengths=torch.full((rows, segments), run.model.segment_length),
        reset=torch.zeros(rows, segments, dtype=torch.bool),
        segment_index=torch.zeros(rows, segments, dtype=torch.int64),
        draws=torch.zeros(rows, segments, 2, dtype=torch.float64),
        repeats=torch.ones(rows, segments, dtype=torch.int64),
    )
