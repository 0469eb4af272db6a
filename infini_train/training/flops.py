"""Model FLOPs of a training token, and the peak rate of this process's device.

Convention: a multiply and an add are two operations; the backward costs twice the forward; recomputation and element-wise work
are not counted. Per token and layer, with H query heads, G key/value heads, head width D and segment length S:

    linear layers     2 × their parameters (the output matrix included, the input embedding not)
    local attention   2 × 2 × H × D × S / 2      scores and values over the mean causal context: S / 2 tokens of a segment, S of
                                                 a window, 3 S / 2 with a cache of the segment before, T / 2 of a micro-batch,
                                                 what the memory tokens see and what sees them
    memory            2 × H × D × (D + 1)        read σ(Q) M and σ(Q) z
                    + 2 × G × D × D              update σ(K)^T V (twice that, plus σ(K) z, for the delta rule)

Memory tokens pass the layers with a segment's own tokens, which share what they cost.
"""

from __future__ import annotations

from infini_train.config import RunConfig
from infini_train.hardware import bfloat16_peak


def linear_parameters(run: RunConfig) -> int:
    """Parameters of all matrix products that a token passes: projections, feed-forward and output matrix."""
    model = run.model
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (attention + feed_forward) + output_matrix_parameters(run)


def output_matrix_parameters(run: RunConfig) -> int:
    """Parameters of the output matrix."""
    return run.model.hidden_size * run.data.vocab_size


def memory_tokens_per_segment(run: RunConfig) -> int:
    """Memory tokens that pass the layers with the tokens of one segment: to be read and to be written, or both in one."""
    return {"recurrent_memory": 2, "feedback": 1}.get(run.model.attention, 0) * run.model.memory_tokens


def core_flops_per_token(run: RunConfig) -> tuple[float, float]:
    """Forward FLOPs of one token in one layer outside of its matrices: (local or full attention, memory)."""
    model = run.model
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.head_dim
    segment, more = model.segment_length, memory_tokens_per_segment(run)
    contexts = {
        "full": run.micro_batch_tokens / 2,
        "window": segment,
        "transformer_xl": 1.5 * segment,
        "recurrent_memory": (segment + more) ** 2 / 2 / segment,  # causal
        # All see the feedback tokens, and these the whole segment.
        "feedback": segment / 2 + more + more * (segment + more) / segment,
    }
    # The search of a bank in one layer of `memorizing` is not counted.
    contexts["memorizing"] = contexts["transformer_xl"]
    attention = 2.0 * 2.0 * heads * width * contexts.get(model.attention, segment / 2)
    memory = 0.0
    if model.attention in ("infini", "linear"):
        memory = 2.0 * heads * width * (width + 1) + 2.0 * groups * width * width
        if model.attention == "infini" and model.update_rule == "delta":
            memory += 2.0 * groups * width * (width + 1)
    return attention, memory


def training_flops_per_token(run: RunConfig) -> float:
    """FLOPs of one token's forward and backward."""
    per_layer = sum(core_flops_per_token(run))
    output = output_matrix_parameters(run)
    share = 1.0 + memory_tokens_per_segment(run) / run.model.segment_length
    return 3.0 * (2.0 * (share * (linear_parameters(run) - output) + output) + run.model.num_layers * per_layer)


def peak_flops() -> float | None:
    """Peak FLOP/s of this process's device; None where it is not known (a CPU)."""
    # Here, because the rest is asked by those who plan without torch.
    import torch

    from infini_train import platform

    return bfloat16_peak(torch.cuda.get_device_name()) if platform.has_cuda() else None
