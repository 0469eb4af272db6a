"""Rotary embedding frequencies, with optional Llama 3.1 context scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infini_train.config import ModelConfig

SCALED_CONTEXT = 8192
"""Context length in tokens of Llama 3's pretraining; the turn counts below refer to it."""
SLOW_TURNS, FAST_TURNS = 1.0, 4.0
"""Scaling bounds, in turns within SCALED_CONTEXT tokens. A channel pair with fewer than SLOW_TURNS turns is slowed down by the
whole factor; a pair with more than FAST_TURNS turns is not slowed down."""


def rotary_frequencies(model: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Return the frequency of each channel pair in radians per position, [D/2] float64.

    The frequencies are base^(-2 i / D). `rotary_scaling` slows them down as Llama 3.1 does (rope_type llama3 in transformers).
    """
    half = model.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    frequencies = model.rotary_base**-exponent
    if model.rotary_scaling == 1.0:
        return frequencies
    turns = SCALED_CONTEXT * frequencies / (2 * math.pi)
    kept = ((turns - SLOW_TURNS) / (FAST_TURNS - SLOW_TURNS)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / model.rotary_scaling)
