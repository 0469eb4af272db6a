"""Liger's kernels (https://github.com/linkedin/Liger-Kernel) in place of the plain norm, SwiGLU and cross entropy.

They are what `training.fused_layers: liger` asks for, on CUDA; on a CPU the plain layers compute the same.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from infini_train import platform
from infini_train.config import RunConfig
from infini_train.errors import UserError
from infini_train.model.feed_forward import FeedForward
from infini_train.model.norm import RMSNorm


def takes_liger(run: RunConfig) -> bool:
    """Whether the model is built with Liger's kernels here.

    Raises:
        UserError: if they are asked for on CUDA and not installed.
    """
    if run.training.fused_layers != "liger" or not platform.has_cuda():
        return False
    if find_spec("liger_kernel") is None:
        raise UserError(
            "training.fused_layers is liger, but the package liger-kernel is not installed; install infini-train[gpu] or write "
            "plain"
        )
    return True


class LigerRMSNorm(RMSNorm):
    """All of it in float32, as in the plain norm."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]"""
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x, self.weight, self.eps, casting_mode="gemma", in_place=False)


class LigerFeedForward(FeedForward):
    """Liger reads the two halves of fc1 from copies of their own."""

    @staticmethod
    def join(halves: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        return liger_swiglu(*halves.chunk(2, dim=-1))


def liger_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token, of a vocabulary that is not split over processes.

    In float32 like the plain loss: Liger's own result would have the type of the logits.

    logits [T, B, V], targets [B, T] -> [B, T] float32
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    wide = logits.transpose(0, 1).float().flatten(0, 1)  # [B T, V]
    return liger_cross_entropy(wide, targets.flatten(), reduction="none").view_as(targets)
