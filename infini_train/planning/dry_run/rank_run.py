"""One rank of a large job, rehearsed in this process: the real code on meta tensors and torch's fake process group.

Real are the process groups' ranks, the model, DeepSpeed's engine and its optimizer, the pipeline with its schedule and
transport, every micro-batch's forward and backward, and the optimizer step. Tensors have shapes and no values, messages have
sizes and no other side. Softmax attention is the flash attention that torch runs on a GPU; norms run as on a CPU. Not covered:
reading data, initial values, evaluation, checkpoints, what fused kernels of a GPU set aside, and how long anything takes.
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
    """Reads the value 0 where the code asks a meta tensor for its value (a loss, a norm)."""

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0.0
        return super().compute(func, args, kwargs)


class FlashAttention:
    """Stands in for the module `flash_attn`: torch would take a meta tensor for one without a fused kernel."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, deterministic: bool) -> Tensor:
        """q [X, T, H, D], k and v [X, T, G, D] -> [X, T, H, D]"""
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, causal, scale=softmax_scale)[0]
        return out.transpose(1, 2)


@dataclass
class DryRun:
    """What one rank did in one step."""

    stage: int
    parameters: dict[str, tuple[int, ...]]
    """Shape on this rank by global name."""
    weights: int
    gradients: int
    optimizer: int
    """Bytes."""
    in_flight: int
    """Micro-batches (and chunks) between forward and backward when most were."""
    activations: int
    memory_states: int
    """Bytes that they kept."""
    peak: int
    """Bytes that were alive at most before the optimizer step."""
    messages: list[Message] = field(default_factory=list)
    """Of the step; what starting DeepSpeed sends is left out."""


@contextmanager
def meta_process(rank: int, processes: int) -> Iterator[None]:
    """Makes this process rank so-and-so of a job whose device is `meta`. It is good for nothing else afterwards.

    Raises:
        UserError: this process belongs to a job already.
    """
    if dist.is_initialized():
        raise UserError("--dry_run needs a process of its own; call `infini-train plan` without a launcher")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.has_cuda = lambda: False
    platform.install()
    from deepspeed.accelerator import get_accelerator

    accelerator, autocast = get_accelerator(), torch.is_autocast_enabled
    # Megatron-core makes its weights and buffers on "the current device", and this project on `platform.device`.
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    platform.device = lambda: META
    # DeepSpeed asks its accelerator for the device of its buffers, and refuses parameters that are elsewhere.
    accelerator.device_name = lambda *_: "meta"
    accelerator.current_device_name = lambda: "meta"
    accelerator.on_accelerator = lambda tensor: tensor.is_meta
    # Torch knows no autocast for meta tensors and raises when it is asked, as checkpointing and the kernels do.
    torch.is_autocast_enabled = lambda kind="cuda": False if kind == "meta" else autocast(kind)
    # On a GPU flash-attn keeps no matrix of scores; neither may what is counted here.
    softmax_attention.flash_attention_for = lambda *_: FlashAttention  # type: ignore[assignment]
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(processes))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    quiet = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        yield


def dry_run(run: RunConfig, processes: int, rank: int) -> DryRun:
    """One training step of one rank; call it once in the life of a process.

    Args:
        rank: below processes.

    Raises:
        UserError: this process belongs to a job already.
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
        in_flight=kept.most_live,
        activations=kept.most_activations,
        memory_states=kept.most_states,
        peak=peak,
        messages=observer.messages,
    )


def _memory(run: RunConfig, pipeline: Any, rows: int, tensor_processes: int) -> Any:
    """What a step before this one left."""
    if run.model.attention != "infini":
        return {}
    from infini_train.model.layer_context import empty_memory

    return empty_memory(run.model, sorted(set().union(*pipeline.chunk_layers)), rows, tensor_processes, META)


def _batch(run: RunConfig, rows: int, context_processes: int) -> Any:
    """A micro-batch without padding in the middle of a document; what it holds decides nothing."""
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
