"""Attention variants behind one interface: Infini-attention (the paper) and its baselines.

No variant creates a process group. Under context parallelism the caller passes one to `Attention.forward`.
"""

from infini_train.attention.base import Attention
from infini_train.attention.full import FullAttention
from infini_train.attention.infini import InfiniAttention
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory, detached, map_tensors, numbers_carried
from infini_train.attention.local import LocalAttention
from infini_train.attention.rivals.linear_attention import LinearAttention
from infini_train.attention.rivals.memorizing import MemorizingAttention
from infini_train.attention.rivals.memory_tokens import FeedbackAttention, RecurrentMemoryAttention
from infini_train.attention.rivals.previous_segment import TransformerXLAttention, WindowAttention
from infini_train.attention.short_convolution import MemoryWithTail, ShortConvolution, with_memory, without_tail
from infini_train.config import ModelConfig

ATTENTION_VARIANTS: dict[str, type[Attention]] = {
    "infini": InfiniAttention,
    "local": LocalAttention,
    "full": FullAttention,
    "window": WindowAttention,
    "transformer_xl": TransformerXLAttention,
    "memorizing": MemorizingAttention,
    "linear": LinearAttention,
    "recurrent_memory": RecurrentMemoryAttention,
    "feedback": FeedbackAttention,
}


def attention_class(model: ModelConfig, layer_number: int) -> type[Attention]:
    """Return the attention class of one layer (counted from 1) for `model.attention`."""
    if model.attention == "memorizing" and layer_number != model.bank_layer:
        return TransformerXLAttention
    return ATTENTION_VARIANTS[model.attention]


def carried_fields(model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
    """Return the memory fields of a layer (counted from 1) in the order of `memory_type`; empty if it carries nothing."""
    fields = attention_class(model, layer_number).carried(model, layer_number)
    if _carries_tail(model):
        fields["tail"] = ShortConvolution.carried(model)
    return fields


def memory_type(model: ModelConfig, layer_number: int) -> type[LayerMemory] | None:
    """Return the named tuple type that a layer takes and returns; None if it carries nothing."""
    return MemoryWithTail if _carries_tail(model) else attention_class(model, layer_number).memory_type


def _carries_tail(model: ModelConfig) -> bool:
    return model.attention == "infini" and model.short_convolution_reach == "document"


def state_numbers(model: ModelConfig) -> int:
    """Count the values that one stream carries between segments over all layers: the memory size in Table 2 of the paper."""
    return sum(numbers_carried(carried_fields(model, layer)) for layer in range(1, model.num_layers + 1))


def build_attention(model: ModelConfig, layer_number: int, num_heads: int, num_groups: int, context_tokens: int) -> Attention:
    """Build the attention of one layer for the heads of this rank.

    Args:
        layer_number: counted from 1 over the whole model.
        num_heads: query heads on this rank.
        num_groups: key/value heads on this rank.
        context_tokens: tokens of one micro-batch row, the longest context of `full`.
    """
    return attention_class(model, layer_number)(model, num_heads, num_groups, context_tokens)


__all__ = [
    "ATTENTION_VARIANTS",
    "Attention",
    "CarriedTensor",
    "FullAttention",
    "InfiniAttention",
    "LayerMemory",
    "LocalAttention",
    "MemoryWithTail",
    "attention_class",
    "build_attention",
    "carried_fields",
    "detached",
    "map_tensors",
    "memory_type",
    "numbers_carried",
    "state_numbers",
    "with_memory",
    "without_tail",
]
