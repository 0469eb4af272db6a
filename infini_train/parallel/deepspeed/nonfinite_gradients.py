"""Skip steps whose gradients are not finite.

DeepSpeed skips a step whose gradient norm is not finite and clears what that ZeRO stage has accumulated; the norm is reduced
over all processes, so they skip together. One thing escapes the norm: a parameter that every tensor rank holds is counted on
the first one only, and a NaN in another rank's copy would reach its weights. This module watches those few vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from infini_train.runtime import platform


class UncountedGradients:
    """Detect non-finite gradients that this process holds but the gradient norm does not count."""

    def __init__(self, module: nn.Module) -> None:
        self.split = parallel_state.get_tensor_model_parallel_world_size() > 1
        self._found = torch.zeros((), device=platform.device())
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            for parameter in module.parameters():
                if not parameter.tensor_model_parallel:  # type: ignore[attr-defined]
                    parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._found += (~torch.isfinite(gradient)).any()

    def not_finite_anywhere(self) -> bool:
        """Return whether any process saw one since the last call. A collective over all processes if tensors are split."""
        if not self.split:
            return False
        dist.all_reduce(self._found)
        found = bool(self._found)
        self._found.zero_()
        return found


@contextmanager
def invalid_norm(zero_optimizer: Any) -> Iterator[None]:
    """Make DeepSpeed's optimizer see a gradient norm that is not finite, so that it skips the step.

    Args:
        zero_optimizer: optimizer of ZeRO stage 1 to 3, or of bfloat16. All processes must enter: it skips the reduction.
    """
    nan = torch.tensor(float("nan"), device=platform.device())
    norms = {"_get_norm_groups": [nan], "scaled_global_norm": nan, "get_grads_for_norm": ([nan], {})}
    name = next(name for name in norms if hasattr(zero_optimizer, name))
    setattr(zero_optimizer, name, lambda *_, **__: norms[name])
    try:
        yield
    finally:
        delattr(zero_optimizer, name)
