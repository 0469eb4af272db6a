"""The model of a stage under DeepSpeed, which reduces gradients over the data-parallel group, clips them and steps AdamW.

The segment pipeline decides when a backward runs. DeepSpeed must neither divide gradients by an accumulation count nor reduce
them before the step. This requires `gradient_accumulation_steps` 1 with `managed_gradient_accumulation` false. `overlap_comm`
stays off: with more than one pipeline stage it silently gave wrong gradients.
"""

from __future__ import annotations

from contextlib import nullcontext, redirect_stdout
from io import StringIO
from math import inf, isfinite
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from infini_train.config import OptimizerConfig, RunConfig
from infini_train.model.stage import StageModel
from infini_train.parallel.deepspeed.gradient_sums import sum_gradients_without_copies
from infini_train.parallel.deepspeed.learning_rate import learning_rate_factor
from infini_train.parallel.deepspeed.nonfinite_gradients import UncountedGradients, force_invalid_norm
from infini_train.parallel.layout import ModelParallelUnit
from infini_train.runtime import platform


def parameter_groups(module: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with weight decay, norms without, and memory gates with their own rate and decay.

    Every stage has the same groups in the same order, because DeepSpeed runs one collective per group.
    """
    matrices, norms, gates = [], [], []
    for name, parameter in module.named_parameters():
        if name.endswith(("attention.gate", "attention.write_gate")):
            gates.append(parameter)
        elif parameter.ndim < 2:
            norms.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {
            "name": "matrices",
            "params": matrices,
            "peak": optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay,
        },
        {"name": "norms", "params": norms, "peak": optimizer.learning_rate, "weight_decay": 0.0},
        {
            "name": "gates",
            "params": gates,
            "peak": optimizer.gate_learning_rate,
            "weight_decay": optimizer.gate_weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def deepspeed_config(run: RunConfig, rows_per_process: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run."""
    bfloat16 = run.training.precision == "bfloat16"
    zero: dict[str, Any] = {"stage": run.layout.zero_stage, "overlap_comm": False}
    if run.layout.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": platform.has_cuda()}
    return {
        "train_micro_batch_size_per_gpu": rows_per_process,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": run.optimizer.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Otherwise offload requires DeepSpeed's Adam, which is compiled at the first start. torch's AdamW runs on the host too.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16, "immediate_grad_update": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # In bfloat16 DeepSpeed would round the float32 sums of each process to bfloat16 before reducing them.
        "communication_data_type": "fp32",
        "steps_per_print": None,
        # The throughput timer synchronises host and device before every forward and after every step, and is not used.
        "timers": {"throughput": {"enabled": False}},
    }


class GradientCarrier(torch.autograd.Function):
    """A scalar whose backward passes each output its given gradient.

    DeepSpeed's `backward` takes one scalar. A micro-batch has several outputs (hidden states or loss, and the memory of every
    layer), each with a known gradient.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients


def _sum_gradients_over_tensor_group(module: nn.Module) -> None:
    """Register hooks that sum the gradients of replicated parameters over the tensor-parallel group.

    Under sequence parallelism each tensor-parallel rank processes only some positions, so these gradients are partial.
    Megatron-core sums them when it finalises gradients, which DeepSpeed never calls. Parameter hooks work with every ZeRO
    stage, even if a gradient is reduced and freed during the backward.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    for parameter in module.parameters():
        if not parameter.tensor_model_parallel:  # type: ignore[attr-defined]
            parameter.register_hook(summed)


class Engine:
    """The model of one pipeline stage with DeepSpeed's optimizer.

    Args:
        module: the stage's layers, with initialised weights.
        run: the run's configuration.
        rows_per_process: rows of a micro-batch on this rank.
    """

    def __init__(self, module: StageModel, run: RunConfig, rows_per_process: int) -> None:
        self.run = run
        self.module = module
        self.adamw = torch.optim.AdamW(
            parameter_groups(module, run.optimizer),
            lr=run.optimizer.learning_rate,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.eps,
            fused=(platform.has_cuda() and not run.layout.offload_optimizer) or None,
        )
        if run.layout.sequence_parallel:
            _sum_gradients_over_tensor_group(module)
        self._uncounted = UncountedGradients(module)
        self._uncounted_not_finite = False
        config = deepspeed_config(run, rows_per_process)
        self._clips_itself = run.layout.zero_stage == 0
        self._own_grad_norm = 0.0
        if self._clips_itself:
            # Without ZeRO, DeepSpeed's clipping ignores the replicated parameters of every pipeline stage but the first.
            config["gradient_clipping"] = 0.0
            self.adamw.register_step_pre_hook(self._clip_before_step)
        with redirect_stdout(StringIO()):  # DeepSpeed's bfloat16 optimizer prints the memory use of each parameter group
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=self.adamw, config=config, mpu=ModelParallelUnit(), dist_init_required=False
            )
        sum_gradients_without_copies(self.deepspeed.optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module with DeepSpeed's hooks and return its output."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Back-propagate one micro-batch from all of its outputs at once. Gradients accumulate until `step`."""
        clear = getattr(self.deepspeed.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            # DeepSpeed clears this flag at each forward, but the schedule runs several backwards in a row. Without clearing,
            # outputs back-propagated by torch alone gave wrong gradients; with GradientCarrier below they do not.
            clear()
        self.deepspeed.backward(GradientCarrier.apply(gradients, *outputs), scale_wrt_gas=False)

    def step(self, step: int) -> float:
        """Reduce and clip gradients and update the weights.

        If any process has a gradient that is not finite, all processes skip the update: weights, moments and Adam's step
        count stay unchanged.

        Args:
            step: 0-based number of this step; it determines the learning rates.

        Returns:
            The global gradient norm before clipping; infinite on all processes if the step was skipped.
        """
        factor = learning_rate_factor(self.run.optimizer, self.run.training.steps, step)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self._uncounted_not_finite = self._uncounted.not_finite_anywhere()
        with (
            force_invalid_norm(self.deepspeed.optimizer)
            if self._uncounted_not_finite and not self._clips_itself
            else nullcontext()
        ):
            self.deepspeed.step()
        norm = self._own_grad_norm if self._clips_itself else self.deepspeed.get_global_grad_norm()
        return float(norm)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each parameter group at the last step."""
        return {group["name"]: group["lr"] for group in self.adamw.param_groups}

    @torch.no_grad()
    def _clip_before_step(self, *_: Any) -> None:
        gradients, squares = [], []
        for parameter in self.module.parameters():
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            split = parameter.tensor_model_parallel  # type: ignore[attr-defined]
            if split or parallel_state.get_tensor_model_parallel_rank() == 0:
                squares.append(parameter.grad.float().square().sum())
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=platform.device())
        torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
        norm = total.sqrt()
        self._own_grad_norm = float(norm)
        if not isfinite(self._own_grad_norm) or self._uncounted_not_finite:
            # AdamW does not change the weight, moments and step count of a parameter without gradient.
            self._own_grad_norm = inf
            for parameter in self.module.parameters():
                parameter.grad = None
            return
        maximum = self.run.optimizer.clip_grad_norm
        if maximum > 0 and self._own_grad_norm > maximum:
            for gradient in gradients:
                gradient.mul_(maximum / (norm + 1e-6))


class InferenceEngine:
    """The model of one pipeline stage without an optimizer, for evaluation and generation."""

    def __init__(self, module: StageModel) -> None:
        self.module = module.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)
