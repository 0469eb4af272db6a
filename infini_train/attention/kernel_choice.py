"""Description of the kernels that compute attention and memory, for the run's start-up message."""

from __future__ import annotations

import torch

from infini_kernels import local_attention_choice, memory_choice
from infini_train.config import ModelConfig


def describe_kernels(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Return a description such as 'attention: flash_attn 2.8.3; memory: triton 3.6.0'."""
    if model.attention not in ("infini", "local", "full"):  # the others use their own masks and sums in PyTorch
        return f"attention: PyTorch {torch.__version__}"
    heads = torch.empty(1, 1, 1, model.head_dim, dtype=dtype, device=device)
    grouped = model.num_query_groups != model.num_attention_heads
    description = f"attention: {local_attention_choice(heads, heads, grouped)}"
    if model.attention != "infini":
        return description
    return f"{description}; memory: {memory_choice(heads, heads, heads)}"
