"""Scaled rotary frequencies equal those of transformers and of the plain reference model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from infini_train.attention import build_attention
from infini_train.attention.rotary_frequencies import rotary_frequencies
from infini_train.config import ModelConfig, RunConfig
from infini_train.convert.llama import LLAMA_3_ROPE_SCALING
from infini_train.reference.plain_model import _rotary

SCALINGS = [(1.0, 1e4, 64), (8.0, 5e5, 128), (32.0, 5e5, 64), (4.0, 1e4, 20)]


@pytest.mark.parametrize("factor,base,width", SCALINGS)
def test_frequencies_equal_transformers(factor, base, width):
    ours = rotary_frequencies(ModelConfig(head_dim=width, rotary_base=base, rotary_scaling=factor))
    scaling = {"rope_type": "llama3", "rope_theta": base, "factor": factor, **LLAMA_3_ROPE_SCALING}
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(num_attention_heads=1, hidden_size=width, max_position_embeddings=131072, rope_parameters=scaling), "cpu"
    )
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    unscaled = rotary_frequencies(ModelConfig(head_dim=width, rotary_base=base))
    assert ours[0] == unscaled[0] and (ours[-1] / unscaled[-1]).item() == pytest.approx(1 / factor)


@pytest.mark.parametrize("factor,base,width", SCALINGS)
def test_angles_equal_the_plain_model(factor, base, width):
    model = ModelConfig(head_dim=width, rotary_base=base, rotary_scaling=factor, segment_length=3000)
    ours = build_attention(model, 1, 4, 4, 3000).rotary(3000, torch.device("cpu"))
    for table, plain in zip(ours, _rotary(RunConfig(model=model), 3000), strict=True):
        torch.testing.assert_close(table, plain, rtol=0, atol=1e-3)  # float32 angles of thousands of radians
