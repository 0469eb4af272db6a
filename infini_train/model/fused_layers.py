"""Fused norm, SwiGLU and cross entropy kernels for CUDA, selected by `training.fused_layers: fused`.

- Norm: PyTorch's fused norm. Versions before 2.9 have none; they use Liger's (https://github.com/linkedin/Liger-Kernel), whose
  call takes a third of a millisecond of host time.
- SwiGLU: a kernel of `infini_kernels`. Liger's reads the two halves of fc1 from copies.
- Cross entropy: compiled by torch.compile. Liger's waits for the device.

Both observations about Liger come from the profile of a training step on an H100. On a CPU all layers are plain.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_train.config import RunConfig
from infini_train.model.feed_forward import FeedForward
from infini_train.model.norm import RMSNorm
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError

NORM_IN_TORCH = hasattr(torch, "_fused_rms_norm")


def uses_fused_layers(run: RunConfig) -> bool:
    """Return whether the model is built with fused layers on this machine.

    Raises:
        UserError: the run asks for fused layers on CUDA, but PyTorch has no fused norm and Liger is not installed.
    """
    if run.training.fused_layers != "fused" or not platform.has_cuda():
        return False
    if not NORM_IN_TORCH and find_spec("liger_kernel") is None:
        raise UserError(
            f"training.fused_layers is fused, but PyTorch {torch.__version__} has no fused norm and the package liger-kernel "
            "is not installed; install infini-train[gpu] or PyTorch 2.9, or write plain"
        )
    return True


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one kernel, computed in float32 like the plain norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] over its last dimension."""
        if NORM_IN_TORCH:
            return super().forward(x)
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, self.weight, self.eps, casting_mode="gemma", in_place=False)


class FusedFeedForward(FeedForward):
    """Feed-forward layer whose SwiGLU is one kernel in the forward and one in the backward."""

    @staticmethod
    def join(halves: Tensor) -> Tensor:
        from infini_kernels.triton.swiglu import swiglu

        return swiglu(halves)


# Compile at the first call, so that runs on a CPU do not import the compiler.
_compiled = cache(torch.compile)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the log-normalisers, each [N] float32, for logits [N, V] and targets [N]."""
    log_sum = logits.float().logsumexp(dim=1)
    return log_sum - logits.gather(1, targets[:, None]).squeeze(1).float(), log_sum


def _gradient(logits: Tensor, targets: Tensor, log_sum: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of `_losses` with respect to the logits, in their dtype."""
    probability = (logits.float() - log_sum[:, None]).exp()
    hit = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return ((probability - hit.float()) * gradient[:, None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy that reads logits in their own dtype and converts them to float32 only in registers.

    Autograd would compute the gradient of the gather as a scatter, which is slow with deterministic algorithms.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, log_sum = _compiled(_losses)(logits, targets)
        ctx.save_for_backward(logits, targets, log_sum)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sum = ctx.saved_tensors
        return _compiled(_gradient)(logits, targets, log_sum, gradient), None


def fused_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross entropy of each token for a vocabulary that is not split over ranks.

    Args:
        logits: [T, B, V].
        targets: [B, T].

    Returns:
        Losses [B, T], float32.
    """
    # Transpose the targets rather than the logits, which are thousands of times larger.
    return _CrossEntropy.apply(logits.flatten(0, 1), targets.t().flatten()).view(logits.shape[:2]).t()
