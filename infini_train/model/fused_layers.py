"""Fused norm, SwiGLU and cross entropy for `training.fused_layers: fused` on CUDA.

The norm is PyTorch's. Before PyTorch 2.9, which has none, it is Liger's (https://github.com/linkedin/Liger-Kernel), whose call
takes the host a third of a millisecond. SwiGLU is our own kernel. The loss is our own code, compiled by torch.compile. Liger's
SwiGLU copies the two halves of fc1, and its cross entropy synchronises with the device, as a profile on an H100 showed. On a
CPU all layers are plain.
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


def takes_fused(run: RunConfig) -> bool:
    """Return whether the model uses fused layers on this device.

    Raises:
        UserError: if they are asked for on CUDA, and Liger is needed and not installed.
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
    """Fused RMSNorm, computed in float32 as the plain norm."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]"""
        if NORM_IN_TORCH:
            return super().forward(x)
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, self.weight, self.eps, casting_mode="gemma", in_place=False)


class FusedFeedForward(FeedForward):
    """Feed-forward layer with SwiGLU in one pass for each direction."""

    @staticmethod
    def join(halves: Tensor) -> Tensor:
        from infini_kernels.triton.swiglu import swiglu

        return swiglu(halves)


# Imported at the first call, so that a CPU does not wait for the compiler's import.
_compiled = cache(torch.compile)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and log-normalisers, each [N] float32, of logits [N, V] and targets [N]."""
    log_sum = logits.float().logsumexp(dim=1)
    return log_sum - logits.gather(1, targets[:, None]).squeeze(1).float(), log_sum


def _gradient(logits: Tensor, targets: Tensor, log_sum: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of `_losses` with respect to the logits, in their type."""
    probability = (logits.float() - log_sum[:, None]).exp()
    hit = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return ((probability - hit.float()) * gradient[:, None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy that holds float32 logits in registers only.

    PyTorch would compute the gradient of a gather as a scatter, which is slow when it must be deterministic.
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
    """Compute the cross entropy of each token in float32. The vocabulary must not be split over processes.

    logits [T, B, V], targets [B, T] -> [B, T] float32
    """
    # Transpose the targets instead of the logits, which are thousands of times as large.
    return _CrossEntropy.apply(logits.flatten(0, 1), targets.t().flatten()).view(logits.shape[:2]).t()
