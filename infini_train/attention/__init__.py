"""Attention variants behind one interface: Infini-attention (the paper) and its rivals. They know no process groups."""

from infini_train.attention.base import Attention, LayerMemory
from infini_train.attention.full import FullAttention
from infini_train.attention.infini import InfiniAttention
from infini_train.attention.local import LocalAttention
from infini_train.config import ModelConfig

ATTENTION_VARIANTS: dict[str, type[Attention]] = {
    "infini": InfiniAttention,
    "local": LocalAttention,
    "full": FullAttention,
}


def build_attention(model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> Attention:
    """The variant that `model.attention` names, for the heads that this process holds.

    Args:
        num_heads: query heads of this process.
        num_groups: key/value heads of this process.
        context_tokens: tokens of one micro-batch row, the longest context of `full`.
    """
    return ATTENTION_VARIANTS[model.attention](model, num_heads, num_groups, context_tokens)


__all__ = [
    "ATTENTION_VARIANTS",
    "Attention",
    "FullAttention",
    "InfiniAttention",
    "LayerMemory",
    "LocalAttention",
    "build_attention",
]
