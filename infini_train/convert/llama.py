"""Mapping between a transformers Llama and the model of this package, whose layers have the same matrices with other names.

H query heads, G key/value heads, R = H / G, D head width, h hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infini_train.attention.rotary_frequencies import FAST_TURNS, SCALED_CONTEXT, SLOW_TURNS
from infini_train.config import ModelConfig
from infini_train.runtime.errors import UserError

MODEL_TYPES = ("llama", "mistral")
"""Supported values of `model_type` in config.json. Mistral is a Llama with a sliding window; here a segment replaces it."""
LLAMA_3_ROPE_SCALING = {
    "low_freq_factor": SLOW_TURNS,
    "high_freq_factor": FAST_TURNS,
    "original_max_position_embeddings": SCALED_CONTEXT,
}
"""Fixed constants of `model.rotary_scaling`. All Llama models from 3.1 on use these values; only the factor varies."""
MAX_SEGMENT_LENGTH = 2048
INITIAL_GATE = -2.0
"""Initial value of the gate β. The untrained memory then has little weight, so the initial loss is close to the loss of the
source model, but gradients still reach the memory. docs/pretrained.md compares it with 0 and -4."""

GLOBAL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Weights outside the layers: name here -> name in transformers."""
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
"""Weights of a layer: name here -> names in transformers of the matrices that it consists of."""
QKV = "self_attention.linear_qkv.weight"


def model_config(config: Mapping[str, Any], path: str) -> ModelConfig:
    """Return the `model` section for the model of a config.json, with Infini-attention added.

    Args:
        config: content of config.json.
        path: path of config.json, for messages.

    Raises:
        UserError: the model is not a Llama, or a feature of it has no counterpart in `model`.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{path}: model_type is {kind}; only {' and '.join(MODEL_TYPES)} have the layers of this model")
    for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("pretraining_tp", 1)):
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {config[key]}; only models with {key} {value} have the layers of this model")
    if config.get("quantization_config"):
        raise UserError(f"{path}: the model is quantized; convert the unquantized original")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{path}: {key} is {config[key]!r}; it must be an object or null")
    rotary = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    hidden, heads = read_positive_int(config, "hidden_size", path), read_positive_int(config, "num_attention_heads", path)
    return ModelConfig(
        attention="infini",
        num_layers=read_positive_int(config, "num_hidden_layers", path),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=read_positive_int(config, "num_key_value_heads", path, heads),
        head_dim=read_positive_int(config, "head_dim", path, hidden // heads),
        ffn_hidden_size=read_positive_int(config, "intermediate_size", path),
        segment_length=min(MAX_SEGMENT_LENGTH, read_positive_int(config, "max_position_embeddings", path)),
        # The source model has no gates, so in the first segment, where the memory is empty, nothing may scale its output.
        first_segment="local_only",
        initial_gate=INITIAL_GATE,
        rotary_base=_number({"rope_theta": 10000.0, **config, **rotary}, "rope_theta", path),
        rotary_scaling=_rotary_scaling(rotary, path),
        norm_eps=_number(config, "rms_norm_eps", path),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rotary_scaling(rotary: Mapping[str, Any], path: str) -> float:
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return 1.0
    if kind != "llama3":
        raise UserError(f"{path}: its rotary embedding is scaled ({kind}); only that of Llama 3 (llama3) can be converted")
    for key, value in LLAMA_3_ROPE_SCALING.items():
        if rotary.get(key) != value:
            raise UserError(f"{path}: {key} of its rotary embedding is {rotary.get(key)}; only {value:g} can be converted")
    if (factor := _number(rotary, "factor", path)) < 1:
        raise UserError(f"{path}: factor of its rotary embedding is {factor:g}; it must be at least 1")
    return factor


def read_positive_int(config: Mapping[str, Any], key: str, path: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}; it must be a positive whole number")
    return value


def _number(config: Mapping[str, Any], key: str, path: str) -> float:
    if not isinstance(value := config.get(key), int | float) or value <= 0:
        raise UserError(f"{path}: {key} is {value!r}; it must be a positive number")
    return float(value)


def llama_config(model: ModelConfig, vocab_size: int, context: int, dtype: str) -> dict[str, Any]:
    """Return the content of config.json for a model's layers without their memory.

    Args:
        vocab_size: rows of the embedding.
        context: number of tokens from the start of a document for which both models compute the same.
        dtype: type of the weights.
    """
    scaling = {"rope_type": "llama3", "factor": model.rotary_scaling, **LLAMA_3_ROPE_SCALING}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rotary_base,
        **({} if model.rotary_scaling == 1.0 else {"rope_scaling": scaling}),
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
    }


def llama_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return name in transformers -> shape of every tensor of a Llama with this configuration."""
    hidden, width = model.hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (vocab_size, hidden)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (model.num_attention_heads * width, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (model.num_query_groups * width, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (model.num_query_groups * width, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, model.num_attention_heads * width)
        shapes[prefix + "mlp.gate_proj.weight"] = (model.ffn_hidden_size, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (model.ffn_hidden_size, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, model.ffn_hidden_size)
    return shapes


def merge_weights(ours: str, tensors: list[Tensor], num_query_groups: int) -> Tensor:
    """Return one matrix of this package, built from the matrices of transformers.

    The qkv matrix holds R queries, the key and the value of each group: [G (R + 2) D, h].

    Args:
        ours: a key of LAYER_NAMES.
        tensors: the matrices of transformers, in the order of LAYER_NAMES.
    """
    if ours == QKV:
        return torch.cat([tensor.unflatten(0, (num_query_groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def split_weight(ours: str, whole: Tensor, model: ModelConfig) -> list[Tensor]:
    """Return the matrices of transformers that `merge_weights` builds `whole` from."""
    count = len(LAYER_NAMES[ours])
    if ours == QKV:
        heads = whole.unflatten(0, (model.num_query_groups, -1, model.head_dim))  # [G, R + 2, D, h]
        return [block.flatten(0, 2).contiguous() for block in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]
    return [block.contiguous() for block in whole.chunk(count)]
