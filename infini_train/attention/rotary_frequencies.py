"""Frequencies of rotary embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infini_train.config import ModelConfig

SCALED_CONTEXT = 8192
"""Context length of Llama 3's pretraining, in tokens. The bounds below refer to it."""
SLOW_TURNS, FAST_TURNS = 1.0, 4.0
"""Pairs that turn less often than the first within SCALED_CONTEXT are slowed down by the whole factor, those that turn more
often than the second not at all."""


def rotary_frequencies(model: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Return the radians per position of each pair of channels, [D/2] float64.

    base^(-2 i / D); with `rotary_scaling` slowed down as Llama 3.1 does it (transformers' rope_type llama3).
    """
    half = model.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    frequencies = model.rotary_base**-exponent
    if model.rotary_scaling == 1.0:
        return frequencies
    turns = SCALED_CONTEXT * frequencies / (2 * math.pi)
    kept = ((turns - SLOW_TURNS) / (FAST_TURNS - SLOW_TURNS)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / model.rotary_scaling)
