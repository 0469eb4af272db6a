"""RMSNorm for Megatron-core's layer spec."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the constructor that Megatron-core calls (its own wrapper refuses sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
