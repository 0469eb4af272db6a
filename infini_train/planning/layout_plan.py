"""The plan of a run on so many GPUs of a kind: whether it fits, what it takes, and how fast it should be."""

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
"""Share of the data sheet's memory that a plan may fill. The rest is for CUDA's context, NCCL's buffers and what the allocator
loses to fragments. A guess: no source."""


PLANNED_ATTENTION = ("infini", "local", "full")
"""Values of model.attention whose memory and time the formulas here know."""


@dataclass(frozen=True)
class Plan:
    """A valid run on GPUs of a kind."""

    sizes: Sizes
    gpu: Gpu

    @cached_property
    def memory(self) -> StageMemory:
        """Of the stage whose processes need most."""
        return worst_stage(self.sizes)

    @cached_property
    def time(self) -> StepTime:
        """Of the stage that is slowest."""
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
        """Whether the worst process stays within the memory of its GPU."""
        return self.memory.total <= self.usable_memory

    @property
    def parameters(self) -> int:
        return total_parameters(self.sizes.run)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.sizes.run)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together, without padding."""
        return self.sizes.run.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        return model_flops_utilization(self.sizes, self.gpu, self.time.total)

    @property
    def days(self) -> float:
        """For all steps of the run, without evaluation, checkpoints and restarts."""
        return self.sizes.run.training.steps * self.time.total / 86400


def plan(run: RunConfig, gpus: int, gpu: str, *, gpus_per_node: int | None = None) -> Plan:
    """Plan a run.

    Args:
        gpus: processes, one a GPU.
        gpu: a name of `infini_train.runtime.hardware.GPUS`.
        gpus_per_node: as many as that table has where None.

    Raises:
        UserError: the GPU is not known, or the run is not valid on so many processes.
    """
    found = find_gpu(gpu)
    if gpus_per_node is not None:
        found = replace(found, gpus_per_node=gpus_per_node)
    validate(run, gpus)
    return Plan(Sizes(run, gpus, kernels=True), found)


def with_layout(run: RunConfig, **values: object) -> RunConfig:
    """The run with other values of its layout."""
    return replace(run, layout=replace(run.layout, **values))  # type: ignore[arg-type]


def with_training(run: RunConfig, **values: object) -> RunConfig:
    """The run with other values of its training section."""
    return replace(run, training=replace(run.training, **values))  # type: ignore[arg-type]
