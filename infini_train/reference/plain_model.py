"""Reference implementation of training in plain torch, without Megatron-core, DeepSpeed, pipeline or micro-batches.

It is the specification of a training step and computes a window in one call. The self-test at a run's start and the tests
compare the product with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from infini_kernels import MemoryState, document_attention, infini_attention, local_attention
from infini_train.attention import LayerMemory, MemoryWithTail, build_attention, detached
from infini_train.attention.rivals.memory_tokens import MemoryTokens
from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import Batch, StreamReader
from infini_train.model.memory_ageing import memory_repeats
from infini_train.parallel.deepspeed.learning_rate import learning_rate_factor


def _rotary(run: RunConfig, positions: int) -> tuple[Tensor, Tensor]:
    frequencies = run.model.rotary_base ** (-torch.arange(0, run.model.head_dim, 2) / run.model.head_dim)
    if run.model.rotary_scaling != 1:
        # Llama 3.1 frequency scaling, as published by Meta.
        for pair, frequency in enumerate(frequencies.tolist()):
            wavelength = 2 * math.pi / frequency
            if wavelength > 8192 / 1:
                frequencies[pair] = frequency / run.model.rotary_scaling
            elif wavelength > 8192 / 4:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                frequencies[pair] = (1 - smooth) * frequency / run.model.rotary_scaling + smooth * frequency
    angles = torch.outer(torch.arange(positions), frequencies)
    return angles.cos(), angles.sin()


def _attention(
    run: RunConfig,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Mapping[str, Any],
    batch: Batch,
    memory: LayerMemory | None,
) -> tuple[Tensor, LayerMemory | None]:
    model = run.model
    if model.attention == "local":
        rotary = _rotary(run, model.segment_length)
        return local_attention(q, k, v, segment_length=model.segment_length, rotary=rotary, lengths=batch.lengths), None
    where: dict[str, Any] = {"reset": batch.reset, "lengths": batch.lengths}
    if model.attention == "full":
        rotary = _rotary(run, q.shape[1])
        return document_attention(q, k, v, segment_length=model.segment_length, rotary=rotary, **where), None
    if model.attention != "infini":
        attention = build_attention(model, layer + 1, model.num_attention_heads, model.num_query_groups, q.shape[1])
        out, leaving = functional_call(attention, dict(own), (q, k, v), {**where, "memory": memory})
        return out, leaving
    assert memory is None or isinstance(memory, MemoryState)
    return infini_attention(
        q,
        k,
        v,
        memory=memory,
        **own,
        segment_length=model.segment_length,
        update_rule=model.update_rule,
        rotary=_rotary(run, model.segment_length),
        **where,
        first_segment=model.first_segment,
        eps=model.memory_eps,
        repeats=batch.repeats,
        normaliser=model.normaliser,
        feature_map=model.feature_map,
    )


Mix = Callable[[int, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""An attention function: (layer from 0, q, k, v, parameters of the layer's attention) -> output [B, T, H, D]."""


def _norm(run: RunConfig, weight: Tensor, x: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + run.model.norm_eps)


def _convolve(run: RunConfig, x: Tensor, filters: Tensor, delay: int, reset: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a causal depthwise convolution over time, within each segment or each document.

    Args:
        x: [B, T, heads, D].
        filters: [G, D, W].
        delay: number of tokens by which the output lags.
        reset: [B, N], whether a segment begins a new document.
        before: [B, W, heads, D], the W tokens before x.

    Returns:
        The filtered x [B, T, heads, D], and the last W tokens [B, W, heads, D], which are `before` of the next call.
    """
    model, tokens, width = run.model, x.shape[1], filters.shape[-1]
    filters = filters.repeat_interleave(x.shape[2] // len(filters), dim=0)
    # Number the segments or documents from 1. A token sees only tokens with its own number. The tokens of `before` have
    # number 0, as has a document that continues from them.
    number = torch.arange(1, reset.shape[1] + 1).expand_as(reset)
    if model.short_convolution_reach == "document":
        number = reset.cumsum(dim=1)
    number = functional.pad(number.repeat_interleave(model.segment_length, dim=1), (width, 0))
    x = torch.cat([before, x], dim=1)
    total = torch.zeros_like(x[:, width:])
    for place in range(width):
        seen = slice(place + 1 - delay, place + 1 - delay + tokens)
        same = number[:, seen] == number[:, width:]
        total = total + filters[..., place] * x[:, seen] * same[..., None, None]
    return total, x[:, -width:]


def _convolve_heads(
    run: RunConfig, q: Tensor, k: Tensor, filters: Tensor, reset: Tensor, entering: LayerMemory | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve q [B, T, H, D] and k [B, T, G, D] with filters [G, D, W].

    Returns:
        The filtered q and k, and the tail [B, G, R + 1, W, D] for the next call: each group's R query heads, then its key head.
    """
    groups, width = len(filters), filters.shape[-1]
    before_q, before_k = (x.new_zeros(len(x), width, *x.shape[2:]) for x in (q, k))
    if isinstance(entering, MemoryWithTail):
        tail = entering.tail.movedim(3, 1)  # [B, W, G, R + 1, D]
        before_q, before_k = tail[:, :, :, :-1].flatten(2, 3), tail[:, :, :, -1]
    q, after_q = _convolve(run, q, filters, 0, reset, before_q)
    k, after_k = _convolve(run, k, filters, 1, reset, before_k)
    tail = torch.cat([after_q.unflatten(2, (groups, -1)), after_k.unsqueeze(3)], dim=3)
    return q, k, tail.movedim(1, 3)


def _layer(run: RunConfig, weights: dict[str, Tensor], layer: int, hidden: Tensor, mix: Mix) -> Tensor:
    """Apply one layer (norm, attention, norm, SwiGLU): [B, T, h] -> [B, T, h]."""
    model, prefix = run.model, f"decoder.layers.{layer}."
    group_size = model.num_attention_heads // model.num_query_groups
    fused = (
        _norm(run, weights[prefix + "input_layernorm.weight"], hidden) @ weights[prefix + "self_attention.linear_qkv.weight"].T
    )
    # Layout of Megatron-core's fused projection: for each key/value head, its query heads, then its key, then its value.
    fused = fused.unflatten(-1, (model.num_query_groups, group_size + 2, model.head_dim))
    q, k, v = fused[..., :group_size, :].flatten(2, 3), fused[..., group_size, :], fused[..., group_size + 1, :]
    attention = prefix + "self_attention.core_attention.attention."
    own = {name.removeprefix(attention): value for name, value in weights.items() if name.startswith(attention)}
    mixed = mix(layer, q, k, v, own)
    hidden = hidden + mixed.flatten(2) @ weights[prefix + "self_attention.linear_proj.weight"].T
    both = _norm(run, weights[prefix + "pre_mlp_layernorm.weight"], hidden) @ weights[prefix + "mlp.linear_fc1.weight"].T
    gates, up = both.chunk(2, dim=-1)
    return hidden + (functional.silu(gates) * up) @ weights[prefix + "mlp.linear_fc2.weight"].T


def _stack(run: RunConfig, weights: dict[str, Tensor], hidden: Tensor, mix: Mix) -> Tensor:
    """Apply all layers and the final norm."""
    for layer in range(run.model.num_layers):
        hidden = _layer(run, weights, layer, hidden, mix)
    return _norm(run, weights["decoder.final_layernorm.weight"], hidden)


def _with_memory_tokens(
    run: RunConfig, weights: dict[str, Tensor], hidden: Tensor, batch: Batch, memory: dict[int, LayerMemory]
) -> Tensor:
    """Apply the stack for `recurrent_memory` and `feedback`: segment by segment, and in each segment layer by layer."""
    model, S, P = run.model, run.model.segment_length, run.model.memory_tokens
    recurrent = model.attention == "recurrent_memory"
    names = ["memory_tokens"] if recurrent else [f"decoder.layers.{i}.memory_tokens" for i in range(model.num_layers)]
    begin = [weights[name].expand(len(hidden), -1, -1) for name in names]
    tokens = [memory[i][0] if i in memory else first for i, first in enumerate(begin)]
    outputs = []
    for segment, x in enumerate(hidden.split(S, dim=1)):
        lengths = batch.lengths[:, segment : segment + 1]

        def mix(layer: int, q: Tensor, k: Tensor, v: Tensor, own: Mapping[str, Tensor], lengths: Tensor = lengths) -> Tensor:
            attention = build_attention(model, layer + 1, q.shape[2], k.shape[2], q.shape[1])
            return attention(q, k, v, reset=batch.reset[:, :1], lengths=lengths, memory=None)[0]

        fresh = batch.reset[:, segment, None, None]
        tokens = [torch.where(fresh, first, now) for first, now in zip(begin, tokens, strict=True)]
        if recurrent:
            x = _stack(run, weights, torch.cat([tokens[0], x, tokens[0]], dim=1), mix)
            tokens, x = [x[:, -P:]], x[:, P:-P]
        else:
            for layer in range(model.num_layers):
                x = _layer(run, weights, layer, torch.cat([x, tokens[layer]], dim=1), mix)
                tokens[layer], x = x[:, S:], x[:, :S]
            x = _norm(run, weights["decoder.final_layernorm.weight"], x)
        outputs.append(x)
    memory.update({i: MemoryTokens(now) for i, now in enumerate(tokens)})
    return torch.cat(outputs, dim=1)


def token_losses(run: RunConfig, weights: dict[str, Tensor], batch: Batch, memory: dict[int, LayerMemory]) -> Tensor:
    """Return the loss of every token [B, T] in nats. Reads `memory` (by layer, from 0) and updates it in place."""
    embedding = weights["embedding.word_embeddings.weight"]

    def mix(layer: int, q: Tensor, k: Tensor, v: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        entering = memory.get(layer)
        filters = weights.get(f"decoder.layers.{layer}.self_attention.core_attention.short_convolution.weight")
        if filters is not None:
            q, k, tail = _convolve_heads(run, q, k, filters, batch.reset, entering)
        if isinstance(entering, MemoryWithTail):
            entering = entering.memory
        mixed, leaving = _attention(run, layer, q, k, v, own, batch, entering)
        if leaving is not None:
            crosses = run.model.short_convolution_reach == "document"
            memory[layer] = MemoryWithTail.joined(leaving, tail) if crosses else leaving
        return mixed

    hidden = embedding[batch.tokens]
    if run.model.attention in ("recurrent_memory", "feedback"):
        hidden = _with_memory_tokens(run, weights, hidden, batch, memory)
    else:
        hidden = _stack(run, weights, hidden, mix)
    logits = hidden @ weights.get("output_layer.weight", embedding).T
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)


def train_plainly(run: RunConfig, dataset: TokenDataset, initial: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Train all rows in this process on the CPU.

    Args:
        initial: full float32 tensor of every parameter, by global name.

    Returns:
        `loss` and `grad_norm` of every step; after the last step, `weights` by global name and `memory` by layer (from 0).
    """
    optimizer_config, training = run.optimizer, run.training
    weights = {name: value.clone().requires_grad_() for name, value in initial.items()}
    gates = [value for name, value in weights.items() if name.endswith("gate")]
    norms = [value for name, value in weights.items() if name.endswith("layernorm.weight")]
    matrices = [value for name, value in weights.items() if value.ndim >= 2 and not name.endswith("gate")]
    assert len(gates) + len(norms) + len(matrices) == len(weights)
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer_config.weight_decay, "peak": optimizer_config.learning_rate},
            {"params": norms, "weight_decay": 0.0, "peak": optimizer_config.learning_rate},
            {"params": gates, "weight_decay": optimizer_config.gate_weight_decay, "peak": optimizer_config.gate_learning_rate},
        ],
        betas=(optimizer_config.beta1, optimizer_config.beta2),
        eps=optimizer_config.eps,
    )
    reader = StreamReader(
        dataset,
        range(training.rows),
        training.rows,
        run.model.segment_length,
        training.seed,
        length_curriculum=training.length_curriculum,
    )
    memory: dict[int, LayerMemory] = {}
    result: dict[str, Any] = {"loss": [], "grad_norm": []}
    # The context of full attention is a micro-batch, so it needs one call per micro-batch. Otherwise a window is one call.
    calls_per_window = training.micro_batches_per_window if run.model.attention == "full" else 1
    segments = training.segments_per_micro_batch * training.micro_batches_per_window // calls_per_window
    for step in range(steps):
        windows = [reader.next(segments) for _ in range(training.windows_per_step * calls_per_window)]
        weight = sum(window.loss_weight for window in windows if window is not None)
        total = 0.0
        for window in windows:
            assert window is not None
            window.repeats = memory_repeats(training, step, window.draws)
            memory = {layer: detached(state) for layer, state in memory.items()}
            loss = (token_losses(run, weights, window, memory) * window.loss_mask).sum() / weight
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), optimizer_config.clip_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(optimizer_config, training.steps, step)
        optimizer.step()
        optimizer.zero_grad()
        result["loss"].append(total)
        result["grad_norm"].append(float(norm))
    result["weights"] = {name: value.detach() for name, value in weights.items()}
    result["memory"] = {layer: detached(state) for layer, state in memory.items()}
    return result
