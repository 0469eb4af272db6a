"""Checks of fused layers against plain ones: values and every gradient, within the rounding of the type."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from unittest.mock import patch

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from infini_train.model import fused_layers as fused
from infini_train.model.feed_forward import FeedForward
from infini_train.model.fused_layers import FusedFeedForward, FusedRMSNorm, fused_cross_entropy
from infini_train.model.norm import RMSNormOnHost

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _agree(found: Callable[..., Tensor], wanted: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    results = []
    for function in (found, wanted):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        out = function(*inputs)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        results.append([out, *torch.autograd.grad((out * direction).sum(), inputs)])
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        scale = y.abs().max().item()
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=TOLERANCE[dtype] * scale)


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def norm_agrees(dtype: torch.dtype, device: str) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=100, num_attention_heads=1)
    leaves = [3 * _normal(7, 3, 100, dtype=dtype, device=device), _normal(100, dtype=dtype, device=device)]
    layer = FusedRMSNorm(config, 100).to(device, dtype)

    def through(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    # PyTorch's norm, and Liger's if it is installed.
    for in_torch in {fused.NORM_IN_TORCH, find_spec("liger_kernel") is None}:
        with patch.object(fused, "NORM_IN_TORCH", in_torch):
            _agree(through, lambda x, weight: RMSNormOnHost.apply(x, weight, 1e-5), leaves, dtype)


def swiglu_agrees(dtype: torch.dtype, device: str) -> None:
    for width in (36, 1100):  # inside one block, and more than one
        _agree(FusedFeedForward.join, FeedForward.join, [_normal(5, 3, 2 * width, dtype=dtype, device=device)], dtype)


def losses_agree(dtype: torch.dtype, device: str) -> None:
    targets = torch.randint(0, 37, (3, 5), generator=torch.Generator().manual_seed(3)).to(device)

    def plain(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float().permute(1, 2, 0), targets, reduction="none")

    _agree(lambda x: fused_cross_entropy(x, targets), plain, [4 * _normal(5, 3, 37, dtype=dtype, device=device)], dtype)
