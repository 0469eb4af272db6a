"""Streaming inference equals one pass over the whole prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infini_train.config import LayoutConfig


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("rule,normaliser", [("linear", "paper"), ("delta", "paper"), ("delta", "corrected")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_segment": "local_only", "short_convolution": 5, "feature_map": "softmax"},
        {"short_convolution": 5, "short_convolution_reach": "document"},
    ],
    ids=["paper", "beyond the paper", "convolution across borders"],
)
def test_a_prompt_of_40_segments(rule, normaliser, options, tensor_parallel, pool, run_config):
    model = replace(run_config.model, update_rule=rule, normaliser=normaliser, **options)
    run = replace(run_config, model=model, layout=LayoutConfig(tensor_parallel_size=tensor_parallel))
    length = 39 * model.segment_length + 7
    tokens = torch.randint(0, run.data.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    for streamed, whole in pool(tensor_parallel).run("tests.support.distributed.jobs", "streaming_logits", run, tokens):
        assert streamed.shape == whole.shape == (length, run.data.vocab_size)
        assert float((streamed - whole).abs().max()) < 1e-4
        assert float(whole.std()) > 1e-2, "constant logits would agree even with wrong code"


@pytest.mark.parametrize("convolution", [0, 3])
@pytest.mark.parametrize("attention", ["local", "full"])
def test_rivals_stream(attention, convolution, pool, run_config):
    training = replace(run_config.training, segments_per_micro_batch=4, micro_batches_per_window=2)
    model = replace(run_config.model, attention=attention, short_convolution=convolution)
    run = replace(run_config, model=model, training=training)
    # Full attention starts with an empty context at each micro-batch, so the prompt must fit into one.
    length = 4 * run.model.segment_length - 3
    tokens = torch.randint(0, run.data.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    (streamed, whole), *_ = pool(1).run("tests.support.distributed.jobs", "streaming_logits", run, tokens)
    assert float((streamed - whole).abs().max()) < 1e-4
