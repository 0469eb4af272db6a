"""Model FLOPs of a training token, and the peak rate of known devices.

Convention: a multiply and an add are two operations; the backward costs twice the forward; recomputation and element-wise work
are not counted. Per token and layer, with H query heads, G key/value heads, head width D and segment length S:

    linear layers     2 × their parameters (the output matrix included, the input embedding not)
    local attention   2 × 2 × H × D × S / 2      scores and values over the mean causal context
    memory            2 × H × D × (D + 1)        read σ(Q) M and σ(Q) z
                    + 2 × G × D × D              update σ(K)^T V (twice that, plus σ(K) z, for the delta rule)
"""

from __future__ import annotations

import torch

from infini_train import platform
from infini_train.config import RunConfig

# Dense bfloat16 peak in FLOP/s, from the vendor's data sheets. Longer names first: "H100 NVL" is not an "H100".
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def linear_parameters(run: RunConfig) -> int:
    """Parameters of all matrix products that a token passes: projections, feed-forward and output matrix."""
    model = run.model
    attention = model.hidden_size * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (attention + feed_forward) + output_matrix_parameters(run)


def output_matrix_parameters(run: RunConfig) -> int:
    """Parameters of the output matrix."""
    return run.model.hidden_size * run.data.vocab_size


def training_flops_per_token(run: RunConfig) -> float:
    """FLOPs of one token's forward and backward."""
    model = run.model
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.head_dim
    context = run.micro_batch_tokens if model.attention == "full" else model.segment_length
    per_layer = 2.0 * 2.0 * heads * width * context / 2
    if model.attention == "infini":
        per_layer += 2.0 * heads * width * (width + 1) + 2.0 * groups * width * width
        if model.update_rule == "delta":
            per_layer += 2.0 * groups * width * (width + 1)
    return 3.0 * (2.0 * linear_parameters(run) + model.num_layers * per_layer)


def peak_flops() -> float | None:
    """Peak FLOP/s of this process's device; None where it is not known (a CPU)."""
    if not platform.has_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
