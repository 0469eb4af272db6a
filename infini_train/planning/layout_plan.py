"""The plan of a run on a number of GPUs of one type: GPU memory, communication, step time, and whether the run fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from infini_train.config import RunConfig
from infini_train.config.validation import validate
from infini_train.model.flops import training_flops_per_token
from infini_train.planning.communication import Traffic, stage_traffic
from infini_train.planning.estimate import StepTime, model_flops_utilization, step_time
from infini_train.planning.gpu_memory import StageMemory, worst_stage
from infini_train.planning.parameter_counts import total_parameters
from infini_train.planning.sizes import Sizes
from infini_train.runtime.hardware import Gpu, find_gpu

USABLE_MEMORY = 0.90
"""Fraction of the data-sheet GPU memory that a plan may use. The rest is for the CUDA context, NCCL buffers and allocator
fragmentation. A guess, no source."""

PLANNED_ATTENTION = ("infini", "local", "full")
"""Values of `model.attention` for which the formulas give GPU memory and time."""


@dataclass(frozen=True)
class Plan:
    """A valid run on GPUs of one type."""

    sizes: Sizes
    gpu: Gpu

    @cached_property
    def memory(self) -> StageMemory:
        """GPU memory of the stage whose processes need the most."""
        return worst_stage(self.sizes)

    @cached_property
    def time(self) -> StepTime:
        """Step time of the slowest stage."""
        return step_time(self.sizes, self.gpu)

    @property
    def traffic(self) -> list[Traffic]:
        """Messages of one process of the slowest stage, in one step."""
        return stage_traffic(self.sizes, self.time.stage)

    @property
    def usable_memory(self) -> float:
        return USABLE_MEMORY * self.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether the process that needs the most GPU memory stays within the usable GPU memory."""
        return self.memory.total <= self.usable_memory

    @property
    def parameters(self) -> int:
        return total_parameters(self.sizes.run)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.sizes.run)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together, assuming no padding."""
        return self.sizes.run.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        return model_flops_utilization(self.sizes, self.gpu, self.time.total)

    @property
    def days(self) -> float:
        """Days for all steps of the run, without evaluation, checkpoints and restarts."""
        return self.sizes.run.training.steps * self.time.total / 86400


def plan(run: RunConfig, gpus: int, gpu: str, *, gpus_per_node: int | None = None) -> Plan:
    """Plan a run.

    Args:
        run: the run.
        gpus: number of GPUs; each has one process.
        gpu: a key of `infini_train.runtime.hardware.GPUS`.
        gpus_per_node: replaces the value of that table if given.

    Raises:
        UserError: the GPU is not known, or the run is not valid on this number of processes.
    """
    found = find_gpu(gpu)
    if gpus_per_node is not None:
        found = replace(found, gpus_per_node=gpus_per_node)
    validate(run, gpus)
    return Plan(Sizes(run, gpus, kernels=True), found)


def with_layout(run: RunConfig, **values: object) -> RunConfig:
    """Return a copy of the run with changed values in its layout section."""
    return replace(run, layout=replace(run.layout, **values))  # type: ignore[arg-type]


def with_training(run: RunConfig, **values: object) -> RunConfig:
    """Return a copy of the run with changed values in its training section."""
    return replace(run, training=replace(run.training, **values))  # type: ignore[arg-type]
