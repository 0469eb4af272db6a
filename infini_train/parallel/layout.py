"""The process groups of a run and the ranks of this process in them."""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from infini_train.config import RunConfig
from infini_train.runtime import platform
from infini_train.runtime.errors import AgreedError, UserError


@dataclass(frozen=True)
class Layout:
    """Ranks of this process and sizes of its groups.

    Consecutive ranks form a tensor-parallel group; the slower dimensions are context, data and pipeline, in this order.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    cp_size: int
    cp_rank: int
    pp_size: int
    pp_rank: int
    virtual_stages: int
    dp_size: int
    dp_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes metrics and prints messages."""
        return self.rank == 0

    def rows(self, total_rows: int) -> range:
        """Return the global rows whose streams this rank reads."""
        share = total_rows // self.dp_size
        return range(self.dp_rank * share, (self.dp_rank + 1) * share)

    def layers(self, num_layers: int) -> list[range]:
        """Return the layers of the model (counted from 0) in each of this stage's chunks."""
        share = num_layers // (self.pp_size * self.virtual_stages)
        starts = [(chunk * self.pp_size + self.pp_rank) * share for chunk in range(self.virtual_stages)]
        return [range(start, start + share) for start in starts]

    def layer_offsets(self, num_layers: int) -> list[int]:
        """Return the number of layers before each of this stage's chunks."""
        return [layers.start for layers in self.layers(num_layers)]


def initialize_process_group(timeout_seconds: float = 1800.0) -> None:
    """Initialise torch.distributed with the launcher's processes, or with this process alone if there is no launcher.

    Args:
        timeout_seconds: time limit of a collective. Only the first call has an effect.
    """
    global _timeout
    if dist.is_initialized():
        return
    # DeepSpeed requires it.
    os.environ.setdefault("LOCAL_RANK", "0")
    if "RANK" not in os.environ:
        dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:
        _timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(platform.backend(), timeout=_timeout)
    atexit.register(destroy_process_groups)


_timeout = timedelta(minutes=30)
"""Timeout of the default process group and of all groups created from it."""


def group_timeout() -> timedelta:
    """Return the time limit of a collective in any group; after it NCCL or gloo ends the process."""
    return _timeout


def initialize_layout(run: RunConfig) -> Layout:
    """Make Megatron-core use the groups of the run's layout, and return the layout of this process."""
    initialize_process_group()
    _initialize_or_reuse_groups(
        run.layout.tensor_parallel_size, run.layout.context_parallel_size, run.layout.pipeline_parallel_size
    )
    if platform.has_cuda():
        # Megatron-core forks this generator around sequence-parallel regions. Nothing here draws from it.
        model_parallel_cuda_manual_seed(run.training.seed)
    return Layout(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        virtual_stages=run.layout.virtual_stages,
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )


_known_groups: dict[tuple[int, int, int], dict[str, Any]] = {}
"""Megatron-core's global groups, by (tp, cp, pp)."""


def _initialize_or_reuse_groups(tp: int, cp: int, pp: int) -> None:
    """Create the groups of a layout once per process, and reuse them afterwards.

    Each group holds threads (gloo) or communicators (NCCL). Megatron-core drops its groups without closing them, and
    DeepSpeed's engines, which are never freed, refer to them. gloo's threads spin if only one side of a connection is closed.
    Groups are therefore kept, and a layout that occurs again (in the self-test and in the run) reuses them.
    """
    if (tp, cp, pp) in _known_groups:
        vars(parallel_state).update(_known_groups[tp, cp, pp])
        return
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(_timeout / timedelta(minutes=1)),
    )
    _known_groups[tp, cp, pp] = {
        name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name == name.upper()
    }


def destroy_process_groups() -> None:
    """Destroy every process group. It is safe to call this twice."""
    _known_groups.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the sum of each value over all processes (float64)."""
    total = torch.tensor(values, dtype=torch.float64, device=platform.device())
    dist.all_reduce(total)
    return total.tolist()


def raise_everywhere(error: UserError | None) -> None:
    """Raise an error on all processes if any process has one. This is a collective over all processes.

    Args:
        error: the error of this process, or None.

    Raises:
        AgreedError: any process has an error; the message is that of the first such rank.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise AgreedError(first) from error


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface on top of Megatron-core's groups.

    DeepSpeed's "model parallel" group is tensor × pipeline, and a process has a rank in it. The tensor-parallel rank decides
    which process counts replicated parameters in the gradient norm. This class must not define
    `initialize_sequence_parallel`: DeepSpeed would then ignore the model-parallel group.
    """

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    # Ranks of a context-parallel group hold the same weights and different tokens, which is data parallelism for DeepSpeed.

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())
