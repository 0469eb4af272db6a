"""Names of the kernels that a run uses."""

from __future__ import annotations

import torch

from infini_kernels import local_attention_choice, memory_choice
from infini_train.config import ModelConfig


def kernels_in_words(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Return a line such as 'attention: flash_attn 2.8.3; memory: triton 3.6.0'."""
    if model.attention not in ("infini", "local", "full"):  # masks and sums of their own
        return f"attention: PyTorch {torch.__version__}"
    heads = torch.empty(1, 1, 1, model.head_dim, dtype=dtype, device=device)
    grouped = model.num_query_groups != model.num_attention_heads
    words = f"attention: {local_attention_choice(heads, heads, grouped)}"
    if model.attention != "infini":
        return words
    return f"{words}; memory: {memory_choice(heads, heads, heads)}"
