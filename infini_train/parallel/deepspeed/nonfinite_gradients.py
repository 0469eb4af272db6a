"""Detection of gradients that are not finite, so that their step is skipped.

DeepSpeed skips a step whose gradient norm is not finite and clears the gradients that its ZeRO stage has accumulated. The norm
is reduced over all processes, so they skip together. It does not cover one case: a replicated parameter is counted on the first
tensor-parallel rank only, so a NaN in another rank's copy would enter that rank's weights. This module checks those vectors.
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
    """Check for values that are not finite in the gradients that this rank holds but the gradient norm does not count."""

    def __init__(self, module: nn.Module) -> None:
        self.split = parallel_state.get_tensor_model_parallel_world_size() > 1
        self._found = torch.zeros((), device=platform.device())
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            for parameter in module.parameters():
                if not parameter.tensor_model_parallel:  # type: ignore[attr-defined]
                    parameter.register_hook(self._check)

    def _check(self, gradient: Tensor) -> None:
        self._found += (~torch.isfinite(gradient)).any()

    def not_finite_anywhere(self) -> bool:
        """Return whether any process found such a gradient since the last call.

        This is a collective over all processes if the tensor-parallel size is above 1.
        """
        if not self.split:
            return False
        dist.all_reduce(self._found)
        found = bool(self._found)
        self._found.zero_()
        return found


@contextmanager
def force_invalid_norm(zero_optimizer: Any) -> Iterator[None]:
    """Make DeepSpeed's optimizer compute a NaN gradient norm within the context, so that it skips the step.

    All processes must enter together, because the norm is not reduced over processes.

    Args:
        zero_optimizer: DeepSpeed's optimizer of ZeRO stage 1 to 3, or its bfloat16 optimizer.
    """
    nan = torch.tensor(float("nan"), device=platform.device())
    norms = {"_get_norm_groups": [nan], "scaled_global_norm": nan, "get_grads_for_norm": ([nan], {})}
    name = next(name for name in norms if hasattr(zero_optimizer, name))
    setattr(zero_optimizer, name, lambda *_, **__: norms[name])
    try:
        yield
    finally:
        delattr(zero_optimizer, name)
