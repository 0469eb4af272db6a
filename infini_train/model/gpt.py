"""Construction of Megatron-core's GPTModel with RMSNorm, SwiGLU, grouped-query attention and `CoreAttention`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional

from infini_train.config import RunConfig
from infini_train.model.core_attention import CoreAttention
from infini_train.model.feed_forward import FeedForward
from infini_train.model.fused_layers import FusedFeedForward, FusedRMSNorm, fused_cross_entropy, uses_fused_layers
from infini_train.model.linear_layers import ColumnLinear, RowLinear
from infini_train.model.loss import ChunkedLossGPTModel
from infini_train.model.memory_token_layers import FeedbackLayer, RecurrentMemoryModel
from infini_train.model.norm import RMSNorm
from infini_train.model.recompute import RecomputedLayer
from infini_train.model.self_attention import SplitSelfAttention
from infini_train.model.stage import StageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layer_spec(run: RunConfig, recomputed: bool) -> ModuleSpec:
    """Return the spec of one transformer layer: norm, attention, norm, SwiGLU.

    Args:
        recomputed: recompute the layer's activations in the backward.
    """
    module, parameters = TransformerLayer, {}
    norm, feed_forward = (FusedRMSNorm, FusedFeedForward) if uses_fused_layers(run) else (RMSNorm, FeedForward)
    if run.model.attention == "feedback":
        module, parameters = FeedbackLayer, {"model": run.model}
    elif recomputed:
        module = RecomputedLayer
    return ModuleSpec(
        module=module,
        params=parameters,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SplitSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=lambda *, config, layer_number, **_: CoreAttention(config, layer_number, run),
                    linear_proj=RowLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=feed_forward, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def transformer_config(run: RunConfig) -> TransformerConfig:
    """Return Megatron-core's configuration for the run.

    Megatron-core's fusions stay off: on a CPU they need a compiler, and on CUDA `model.fused_layers` replaces them.
    """
    model, layout = run.model, run.layout
    dtype = DTYPES[run.training.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=layout.tensor_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # `initialize_parameters` draws the weights from their global names, so that they do not depend on the layout.
        perform_initialization=False,
        # `RecomputedLayer` recomputes layers; Megatron-core's recompute would lose the gradient of the memory.
        recompute_granularity=None,
    )


def build_stage(run: RunConfig, stage: int) -> StageModel:
    """Build the layers of one pipeline stage on this rank's device, with uninitialised weights.

    Megatron-core's process groups must exist. The first chunk of the first stage embeds tokens. The last chunk of the last
    stage returns the loss per token [B, T] (float32) if labels are given, and logits [B, T, V / tp] otherwise.

    Args:
        stage: index of the pipeline stage, from 0.
    """
    layout = run.layout
    config = transformer_config(run)
    chunk_layers = run.model.num_layers // layout.num_virtual_stages
    fused = uses_fused_layers(run)
    layers = [layer_spec(run, number < run.recomputed_layers) for number in range(chunk_layers)]
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=FusedRMSNorm if fused else RMSNorm)
    chunks = []
    for chunk in range(layout.virtual_stages):
        virtual_stage = chunk * layout.pipeline_parallel_size + stage
        model_class: Any = ChunkedLossGPTModel
        if run.model.attention == "recurrent_memory":
            model_class = partial(RecurrentMemoryModel, model=run.model)
        chunks.append(
            model_class(
                config,
                block,
                vocab_size=run.data.vocab_size,
                max_sequence_length=run.micro_batch_tokens,
                pre_process=virtual_stage == 0,
                post_process=virtual_stage == layout.num_virtual_stages - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=run.model.tie_embeddings,
                position_embedding_type="none",
                vp_stage=chunk if layout.virtual_stages > 1 else None,
                loss_chunk_tokens=run.training.loss_chunk_tokens,
                token_losses=fused_cross_entropy if fused and layout.tensor_parallel_size == 1 else None,
            )
        )
    device = torch.cuda.current_device()  # the CPU on a machine without CUDA: see infini_train.runtime.platform
    return StageModel(chunks).to(device=device, dtype=DTYPES[run.training.precision])
