"""Communication of one process of a stage in one optimizer step: kind, number of messages, bytes and link.

`infini_train.parallel.layout` orders the ranks: neighbouring ranks form a tensor group, then come context, data and pipeline.
Nodes hold consecutive ranks. Groups of n processes with stride s fill blocks of n × s ranks. So every group of a kind stays
within one node if n × s divides the GPUs per node. Otherwise some groups span nodes: with 8 GPUs per node, the third group
of 3 neighbours is on two nodes.
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
    """Messages of one process with the same operation, group and size."""

    kind: Kind
    """Process group: tensor, context, pipeline or data parallel. The data-parallel group includes the context ranks."""
    operation: Operation
    what: str
    messages: int
    """Number of messages that one process sends in one step."""
    bytes: int
    """Bytes of one message: the full tensor. This is the output of a gather and the input of a reduction."""
    size: int
    """Number of processes in the group."""
    stride: int
    """Distance between neighbouring ranks of the group."""
    processes: int
    """Number of processes in the job."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that one process sends in one step with ring algorithms (arXiv 1909.09756, section 2)."""
        parts = {"send": 1.0, "all_reduce": 2 * (self.size - 1) / self.size}
        return self.messages * self.bytes * parts.get(self.operation, (self.size - 1) / self.size)

    def per_node(self, gpus_per_node: int) -> int:
        """Return the smallest number of processes that a group of this kind has on one node; that group is the slowest."""
        return max(1, gcd(self.size * self.stride, min(gpus_per_node, self.processes)) // self.stride)

    def link(self, gpus_per_node: int) -> Literal["NVLink", "network"]:
        """Return the slowest link that the group uses."""
        return "NVLink" if self.per_node(gpus_per_node) == self.size else "network"


def stage_traffic(sizes: Sizes, stage: int) -> list[Traffic]:
    """Return the messages of one process of a stage in one step.

    Messages whose size does not depend on the model are left out, and so are groups of one process.
    """
    micro_batches = sizes.run.micro_batches_per_step
    traffic = [*_tensor(sizes, stage), *_context(sizes), *_pipeline(sizes, stage)]
    per_step = [*_data(sizes, stage, micro_batches)]
    return [_times(item, micro_batches) for item in traffic if item.messages] + per_step


def _times(item: Traffic, micro_batches: int) -> Traffic:
    return replace(item, messages=item.messages * micro_batches)


def _tensor(sizes: Sizes, stage: int) -> Iterator[Traffic]:
    """Yield the messages of one micro-batch over the tensor group."""
    if sizes.tp == 1:
        return
    run, layers, recomputed = sizes.run, sizes.stage_layers, sizes.recomputed_layers
    hidden = sizes.tokens * run.model.hidden_size * sizes.element
    first, last = sizes.is_first(stage), sizes.is_last(stage)
    # Number of forward passes through the embedding: recompute "layer" repeats only the layers.
    embeddings = (2 if run.training.recompute == "stage" else 1) * first
    outputs = (2 if run.training.recompute == "stage" else 1) * last

    def item(operation: Operation, what: str, messages: int, size: int) -> Traffic:
        return Traffic("tensor", operation, what, messages, size, size=sizes.tp, stride=1, processes=sizes.processes)

    # Outputs of linear_proj and fc2 are reduced. Recomputation of a layer stops at the saved input of fc2.
    reduced = 4 * layers + recomputed * (2 if run.training.recompute == "stage" else 1) + embeddings

    if run.layout.sequence_parallel:
        yield item("all_gather", "hidden states and their gradients", 6 * layers + 2 * recomputed + outputs + first, hidden)
        yield item("reduce_scatter", "hidden states and their gradients", reduced, hidden)
        norms = 2 * layers + last
        yield item("all_reduce", "gradients of norms", norms, run.model.hidden_size * sizes.element)
    else:
        yield item("all_reduce", "hidden states and their gradients", reduced, hidden)
    if last:
        # A chunked loss is recomputed in the backward pass, chunk by chunk.
        again = outputs + activations.chunks_loss(sizes)
        chunk = activations.loss_chunk_tokens(sizes)
        whole, rest = divmod(sizes.tokens, chunk)
        for chunks, tokens in ((whole, chunk), (bool(rest), rest)):
            each = tokens * run.model.hidden_size * sizes.element
            yield item("all_reduce", "gradient of the output layer's input", chunks, each)
            yield item("all_reduce", "maximum, sum and target of the logits", 3 * chunks * again, tokens * FLOAT32)


def _context(sizes: Sizes) -> Iterator[Traffic]:
    """Yield the messages of one micro-batch over the context group.

    The forward pass sends memory maps and convolution tails; the backward pass sends their gradients.
    """
    if sizes.cp == 1 or not sizes.has_memory:
        return
    model = sizes.run.model
    width, layers = model.head_dim, sizes.stage_layers
    heads = sizes.cp * sizes.rows * sizes.groups * FLOAT32
    factor = width if model.update_rule == "delta" else 1
    exchanged = {
        "memory maps, z": heads * (width + 1),
        "memory maps, M": heads * width * (model.memory_value_width + factor),
    }
    if sizes.tail_bytes:
        exchanged["convolution tails"] = sizes.cp * sizes.tail_bytes
    for name, size in exchanged.items():
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
    """Yield the messages of one micro-batch to neighbouring stages. Memory states and their gradients stay on their stage."""
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
    """Yield the messages of one step that DeepSpeed sends among the processes with the same weights."""
    if sizes.replicas == 1:
        return
    run = sizes.run
    numbers = count(stage_parameters(sizes, stage))
    weights, gradients = numbers * sizes.element, numbers * FLOAT32
    zero = run.layout.zero_stage

    def item(operation: Operation, what: str, messages: int, size: int) -> Traffic:
        return Traffic("data", operation, what, messages, size, size=sizes.replicas, stride=sizes.tp, processes=sizes.processes)

    # Observed with DeepSpeed 0.19: ZeRO 0 to 2 all-reduce gradients; ZeRO 2 does so in every backward pass.
    if zero == 3:
        yield item("reduce_scatter", "gradients", micro_batches, gradients)
        # One gather for the forward pass, one for the backward pass, and one more for recomputed layers.
        passes = 2 + (sizes.recomputed_layers > 0)
        each = weights * (2 + sizes.recomputed_layers / sizes.stage_layers) / passes
        yield item("all_gather", "weights", passes * micro_batches, round(each))
        return
    yield item("all_reduce", "gradients", micro_batches if zero == 2 else 1, gradients)
    if zero:
        yield item("all_gather", "updated weights", 1, weights)
