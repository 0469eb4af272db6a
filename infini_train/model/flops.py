"""Model FLOPs per training token, and the peak FLOP/s of this process's device.

Convention: a multiply and an add count as two operations. The backward pass costs twice the forward pass. Recomputation and
element-wise operations are not counted. Forward FLOPs per token and layer, with H query heads, G key/value
heads, head width D and segment length S:

    linear layers     2 × their parameters (with the output matrix, without the input embedding)
    local attention   2 × 2 × H × D × S / 2      scores and values over the mean causal context. It is S / 2 tokens within a
                                                 segment, S for a sliding window, 3 S / 2 with a cache of the previous segment,
                                                 and T / 2 for full attention over a micro-batch of T tokens. Attention from
                                                 and to memory tokens is added.
    memory            2 × H × D × (D + 1)        read σ(Q) M and σ(Q) z
                    + 2 × G × D × D              update σ(K)^T V (twice that, plus σ(K) z, for the delta rule)

Memory tokens pass through the layers with the tokens of a segment; their cost is divided among those tokens.
"""

from __future__ import annotations

from infini_train.config import RunConfig
from infini_train.runtime.hardware import bfloat16_peak


def linear_parameters(run: RunConfig) -> int:
    """Return the number of parameters in matrix products: attention projections, feed-forward and output matrix."""
    model = run.model
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (attention + feed_forward) + output_matrix_parameters(run)


def output_matrix_parameters(run: RunConfig) -> int:
    """Return the number of parameters of the output matrix."""
    return run.model.hidden_size * run.data.vocab_size


def memory_tokens_per_segment(run: RunConfig) -> int:
    """Return how many memory tokens pass through the layers with one segment.

    `recurrent_memory` has separate tokens to read and to write; `feedback` uses the same tokens for both.
    """
    return {"recurrent_memory": 2, "feedback": 1}.get(run.model.attention, 0) * run.model.memory_tokens


def core_flops_per_token(run: RunConfig) -> tuple[float, float]:
    """Return the forward FLOPs of one token in one layer without its matrix products: (local or full attention, memory)."""
    model = run.model
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.head_dim
    segment, memory_tokens = model.segment_length, memory_tokens_per_segment(run)
    contexts = {
        "full": run.micro_batch_tokens / 2,
        "window": segment,
        "transformer_xl": 1.5 * segment,
        "recurrent_memory": (segment + memory_tokens) ** 2 / 2 / segment,  # causal
        # Each token attends to the feedback tokens; these attend to the whole segment.
        "feedback": segment / 2 + memory_tokens + memory_tokens * (segment + memory_tokens) / segment,
    }
    # The bank search in one layer of `memorizing` is not counted.
    contexts["memorizing"] = contexts["transformer_xl"]
    attention = 2.0 * 2.0 * heads * width * contexts.get(model.attention, segment / 2)
    memory = 0.0
    if model.attention in ("infini", "linear"):
        memory = 2.0 * heads * width * (width + 1) + 2.0 * groups * width * width
        if model.attention == "infini" and model.update_rule == "delta":
            memory += 2.0 * groups * width * (width + 1)
    return attention, memory


def training_flops_per_token(run: RunConfig) -> float:
    """Return the FLOPs of the forward and backward pass of one token."""
    per_layer = sum(core_flops_per_token(run))
    output = output_matrix_parameters(run)
    share = 1.0 + memory_tokens_per_segment(run) / run.model.segment_length
    return 3.0 * (2.0 * (share * (linear_parameters(run) - output) + output) + run.model.num_layers * per_layer)


def peak_flops() -> float | None:
    """Return the peak bfloat16 FLOP/s of this process's device; None if unknown, as for a CPU."""
    # Imported here, because `plan` uses the rest of this module without torch.
    import torch

    from infini_train.runtime import platform

    return bfloat16_peak(torch.cuda.get_device_name()) if platform.has_cuda() else None
