"""What one process of a stage sends in one optimizer step: kind, number of messages, bytes, and the link that carries them.

Ranks lie as `infini_train.parallel.layout` makes them: neighbours form a tensor group, then context, data and pipeline. Nodes
take consecutive ranks, and groups of n processes that lie s apart fill blocks of n × s ranks. So all groups of a kind stay in
one node each if n × s divides the GPUs of a node: on nodes of 8, the third group of 3 neighbours is on two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from infini_train.planning import activations
from infini_train.planning.parameter_counts import count, stage_parameters
from infini_train.planning.sizes import FLOAT32, Sizes

Kind = Literal["tensor", "context", "pipeline", "data"]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Traffic:
    """Messages of one process that are alike."""

    kind: Kind
    """Which group: over tensor, context, pipeline or data parallelism (the last includes context ranks)."""
    operation: Operation
    what: str
    messages: int
    """In one step, by one process."""
    bytes: int
    """Of one message: the whole tensor, the gathered one for a gather, the unreduced one for a reduction."""
    size: int
    """Processes of the group."""
    stride: int
    """Distance of their ranks."""
    processes: int
    """Of the run."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that one process sends in one step with ring algorithms (arXiv 1909.09756, section 2)."""
        parts = {"send": 1.0, "all_reduce": 2 * (self.size - 1) / self.size}
        return self.messages * self.bytes * parts.get(self.operation, (self.size - 1) / self.size)

    def per_node(self, gpus_per_node: int) -> int:
        """Processes of a group in one node, where they are fewest: that group holds up the others."""
        return max(1, gcd(self.size * self.stride, min(gpus_per_node, self.processes)) // self.stride)

    def link(self, gpus_per_node: int) -> Literal["NVLink", "network"]:
        """The slowest link on the way."""
        return "NVLink" if self.per_node(gpus_per_node) == self.size else "network"


def stage_traffic(sizes: Sizes, stage: int) -> list[Traffic]:
    """All messages of one process of a stage in one step whose size depends on the model; empty groups are left out."""
    micro_batches = sizes.run.micro_batches_per_step
    traffic = [*_tensor(sizes, stage), *_context(sizes), *_pipeline(sizes, stage)]
    per_step = [*_data(sizes, stage, micro_batches)]
    return [_times(item, micro_batches) for item in traffic if item.messages] + per_step


def _times(item: Traffic, micro_batches: int) -> Traffic:
    return replace(item, messages=item.messages * micro_batches)


def _tensor(sizes: Sizes, stage: int) -> Iterator[Traffic]:
    """Of one micro-batch, over the tensor group."""
    if sizes.tp == 1:
        return
    run, layers, recomputed = sizes.run, sizes.stage_layers, sizes.recomputed_layers
    hidden = sizes.tokens * run.model.hidden_size * sizes.element
    first, last = sizes.is_first(stage), sizes.is_last(stage)
    # Forwards of the embedding: with recompute "layer" only the layers run again.
    embeddings = (2 if run.training.recompute == "stage" else 1) * first
    outputs = (2 if run.training.recompute == "stage" else 1) * last

    def item(operation: Operation, what: str, messages: int, size: int) -> Traffic:
        return Traffic("tensor", operation, what, messages, size, size=sizes.tp, stride=1, processes=sizes.processes)

    # What enters linear_proj and fc2 is reduced behind them. A layer that is computed again stops at what fc2 keeps, before it.
    reduced = 4 * layers + recomputed * (2 if run.training.recompute == "stage" else 1) + embeddings

    if run.layout.sequence_parallel:
        yield item("all_gather", "hidden states and their gradients", 6 * layers + 2 * recomputed + outputs + first, hidden)
        yield item("reduce_scatter", "hidden states and their gradients", reduced, hidden)
        norms = 2 * layers + last
        yield item("all_reduce", "gradients of norms", norms, run.model.hidden_size * sizes.element)
    else:
        yield item("all_reduce", "hidden states and their gradients", reduced, hidden)
    if last:
        # A loss that is taken in chunks is computed once more in the backward, chunk by chunk.
        again = outputs + activations.chunks_loss(sizes)
        chunk = activations.loss_chunk_tokens(sizes)
        whole, rest = divmod(sizes.tokens, chunk)
        for chunks, tokens in ((whole, chunk), (bool(rest), rest)):
            each = tokens * run.model.hidden_size * sizes.element
            yield item("all_reduce", "gradient of the output layer's input", chunks, each)
            yield item("all_reduce", "maximum, sum and target of the logits", 3 * chunks * again, tokens * FLOAT32)


def _context(sizes: Sizes) -> Iterator[Traffic]:
    """Of one micro-batch, over the context group: memory maps and convolution tails forward, their gradients backward."""
    if sizes.cp == 1 or not sizes.has_memory:
        return
    model = sizes.run.model
    width, layers = model.head_dim, sizes.stage_layers
    heads = sizes.cp * sizes.rows * sizes.groups * FLOAT32
    factor = width if model.update_rule == "delta" else 1
    travels = {
        "memory maps, z": heads * (width + 1),
        "memory maps, M": heads * width * (model.memory_value_width + factor),
    }
    if sizes.tail_bytes:
        travels["convolution tails"] = sizes.cp * sizes.tail_bytes
    for name, size in travels.items():
        for operation, what, messages in (
            ("all_gather", name, layers + sizes.recomputed_layers),
            ("all_reduce", f"gradients of {name}", layers),
        ):
            yield Traffic(
                "context",
                operation,  # type: ignore[arg-type]
                what,
                messages,
                size,
                size=sizes.cp,
                stride=sizes.tp,
                processes=sizes.processes,
            )


def _pipeline(sizes: Sizes, stage: int) -> Iterator[Traffic]:
    """Of one micro-batch, to the neighbouring stages. Memory states never leave their stage, and so neither their gradients."""
    if sizes.pp == 1:
        return
    hidden = sizes.shard_tokens * sizes.run.model.hidden_size * sizes.element
    stride = sizes.tp * sizes.cp * sizes.dp
    chunks = sizes.run.layout.virtual_stages
    for what, messages in (
        ("hidden states", chunks - sizes.is_last(stage)),
        ("gradients of hidden states", chunks - sizes.is_first(stage)),
    ):
        yield Traffic("pipeline", "send", what, messages, hidden, size=sizes.pp, stride=stride, processes=sizes.processes)


def _data(sizes: Sizes, stage: int, micro_batches: int) -> Iterator[Traffic]:
    """Of one step, over the processes that hold the same weights: what DeepSpeed reduces and gathers."""
    if sizes.replicas == 1:
        return
    run = sizes.run
    numbers = count(stage_parameters(sizes, stage))
    weights, gradients = numbers * sizes.element, numbers * FLOAT32
    zero = run.layout.zero_stage

    def item(operation: Operation, what: str, messages: int, size: int) -> Traffic:
        return Traffic("data", operation, what, messages, size, size=sizes.replicas, stride=sizes.tp, processes=sizes.processes)

    # Seen with DeepSpeed 0.19: stages 0 to 2 all-reduce, stage 2 in every backward.
    if zero == 3:
        yield item("reduce_scatter", "gradients", micro_batches, gradients)
        # For the forward, the backward and, of the layers that are computed again, once more.
        passes = 2 + (sizes.recomputed_layers > 0)
        each = weights * (2 + sizes.recomputed_layers / sizes.stage_layers) / passes
        yield item("all_gather", "weights", passes * micro_batches, round(each))
        return
    yield item("all_reduce", "gradients", micro_batches if zero == 2 else 1, gradients)
    if zero:
        yield item("all_gather", "updated weights", 1, weights)
