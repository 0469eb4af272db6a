"""Fused kernels in place of the plain norm, SwiGLU and cross entropy: what `training.fused_layers: fused` asks for, on CUDA.

The norm is PyTorch's, or before 2.9, which has none, Liger's (https://github.com/linkedin/Liger-Kernel): the host takes a third
of a millisecond to call that one. SwiGLU is our own, and so is the loss, which torch.compile makes a kernel of. Liger's SwiGLU
reads the two halves of fc1 from copies, and its cross entropy waits for the device: both were seen in the profile of a training
step on an H100. On a CPU all layers are plain.
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
    """Whether the model is built with fused layers here.

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
    """All of it in float32, as in the plain norm."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]"""
        if NORM_IN_TORCH:
            return super().forward(x)
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, self.weight, self.eps, casting_mode="gemma", in_place=False)


class FusedFeedForward(FeedForward):
    """Each direction of SwiGLU in one pass."""

    @staticmethod
    def join(halves: Tensor) -> Tensor:
        from infini_kernels.triton.swiglu import swiglu

        return swiglu(halves)


# When they are first called, because a CPU should not wait for the compiler's import.
_compiled = cache(torch.compile)


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> losses and logarithms of the normalisers, each [N] float32."""
    log_sum = logits.float().logsumexp(dim=1)
    return log_sum - logits.gather(1, targets[:, None]).squeeze(1).float(), log_sum


def _gradient(logits: Tensor, targets: Tensor, log_sum: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `_losses` to the logits, in their type."""
    probability = (logits.float() - log_sum[:, None]).exp()
    hit = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return ((probability - hit.float()) * gradient[:, None]).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Logits are read as they are and exist in float32 in registers alone. The gradient of a gather, which PyTorch would
    compute, is a scatter: slow where the same bits are asked for twice."""

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
    """Cross entropy of each token in float32, of a vocabulary that is not split over processes.

    logits [T, B, V], targets [B, T] -> [B, T] float32
    """
    # The targets are turned, and not the logits, which are thousands of times as many.
    return _CrossEntropy.apply(logits.flatten(0, 1), targets.t().flatten()).view(logits.shape[:2]).t()
