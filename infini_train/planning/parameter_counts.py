"""Global names and shapes of the parameters of a stage. Tests compare them with the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from infini_train.config import LayoutConfig, RunConfig
from infini_train.planning.sizes import Sizes


def stage_parameters(sizes: Sizes, stage: int) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of the slice that a process of this stage holds, before ZeRO shards it."""
    run, tp = sizes.run, sizes.tp
    model = run.model
    vocabulary = (run.data.vocab_size // tp, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {}
    if model.attention == "recurrent_memory":
        shapes["memory_tokens"] = (model.memory_tokens, model.hidden_size)
    for chunk in range(run.layout.virtual_stages):
        if sizes.is_first(stage, chunk):
            shapes["embedding.word_embeddings.weight"] = vocabulary
        start = (chunk * sizes.pp + stage) * sizes.chunk_layers
        for layer in range(start, start + sizes.chunk_layers):
            shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer(sizes, layer + 1)}
        if sizes.is_last(stage, chunk):
            shapes["decoder.final_layernorm.weight"] = (model.hidden_size,)
            if not model.tie_embeddings:
                shapes["output_layer.weight"] = vocabulary
    return shapes


def _layer(sizes: Sizes, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameter names and shapes of one layer.

    Args:
        number: layer number in the whole model, counted from 1.
    """
    model = sizes.run.model
    hidden, width, inner = model.hidden_size, model.head_dim, model.ffn_hidden_size // sizes.tp
    yield "input_layernorm.weight", (hidden,)
    if model.attention == "feedback":
        yield "memory_tokens", (model.memory_tokens, hidden)
    if model.attention == "memorizing" and number == model.bank_layer:
        yield "self_attention.core_attention.attention.gate", (sizes.heads,)
    if sizes.has_memory:
        yield "self_attention.core_attention.attention.gate", (sizes.heads,)
        if model.write_strength == "learned":
            yield "self_attention.core_attention.attention.write_gate", (sizes.groups, width)
    if model.short_convolution:
        yield "self_attention.core_attention.short_convolution.weight", (sizes.groups, width, model.short_convolution)
    yield "self_attention.linear_proj.weight", (hidden, sizes.heads * width)
    yield "self_attention.linear_qkv.weight", ((sizes.heads + 2 * sizes.groups) * width, hidden)
    yield "pre_mlp_layernorm.weight", (hidden,)
    yield "mlp.linear_fc1.weight", (2 * inner, hidden)
    yield "mlp.linear_fc2.weight", (hidden, inner)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the total number of elements in tensors of these shapes."""
    return sum(prod(shape) for shape in shapes.values())


def model_parameters(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return global name -> shape of every parameter of the whole model."""
    return stage_parameters(Sizes(replace(run, layout=LayoutConfig()), 1), 0)


def total_parameters(run: RunConfig) -> int:
    """Return the number of parameters of the whole model."""
    return count(model_parameters(run))
