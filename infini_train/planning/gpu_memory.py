"""Memory of one process of a stage, by part.

Weights, gradients and optimizer follow what DeepSpeed keeps for each ZeRO stage; p are the stage's parameters on one process, r
the processes that hold the same ones (data times context parallelism):

    precision, ZeRO     weights  gradients                        master weights and moments
    bfloat16, 1         2 p      4 p (float32 sums)               12 p / r
    float32, 0          4 p      4 p                              8 p (no master weights)
    float32, 1          4 p      4 p                              12 p / r
    float32, 2          4 p      4 p / r                          12 p / r
    float32, 3          4 p / r  4 p / r                          12 p / r
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from infini_train.planning import activations
from infini_train.planning.parameter_counts import count, stage_parameters
from infini_train.planning.sizes import FLOAT32, Sizes

REDUCE_BUCKET = 500_000_000
"""Numbers that DeepSpeed's ZeRO 1 to 3 set aside for gradients under way (its default `reduce_bucket_size`)."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters with fewer numbers whole (its default `stage3_param_persistence_threshold`)."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one process of a stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    per_micro_batch: int
    """Activations of one micro-batch in flight, the mean over the stage's chunks."""
    in_flight: int
    """Micro-batches (and chunks) between forward and backward when most are."""
    activations: int
    """Of all that are in flight."""
    memory_states: int
    """M and z that enter and leave the micro-batches in flight, and their gradients in a backward."""
    backward_buffers: int
    """What a backward needs for itself at its peak: recomputed activations, logits, gradients inside a layer."""
    step_buffers: int
    """What reducing and stepping need; activations are gone by then."""
    constant_buffers: int
    """Rotary tables and DeepSpeed's bucket."""

    @property
    def buffers(self) -> int:
        """What makes up the peak beside the other parts."""
        return self.total - self.weights - self.gradients - self.optimizer - self.activations - self.memory_states

    @property
    def total(self) -> int:
        """The peak: in a backward with most micro-batches in flight, or in the optimizer step."""
        static = self.weights + self.gradients + self.optimizer + self.constant_buffers + self.memory_states
        return static + max(self.activations + self.backward_buffers, self.step_buffers)


def stage_memory(sizes: Sizes, stage: int) -> StageMemory:
    """The memory of one stage's processes."""
    in_flight = sizes.in_flight(stage)
    live = in_flight.micro_batches
    chunks = [activations.micro_batch_bytes(sizes, stage, chunk) for chunk in range(len(live))]
    kept = sum(number * size for number, size in zip(live, chunks, strict=True))
    states = sizes.chunk_layers * sizes.state_bytes
    weights, gradients, optimizer, step, bucket = _parameter_bytes(sizes, stage)
    rotary = sizes.stage_layers * sizes.run.model.segment_length * sizes.run.model.head_dim * FLOAT32
    return StageMemory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        per_micro_batch=kept // sum(live),
        in_flight=sum(live),
        activations=kept,
        memory_states=states * in_flight.states,
        backward_buffers=max(_backward_bytes(sizes, stage, chunk) for chunk in range(len(live))),
        step_buffers=step,
        constant_buffers=rotary + bucket,
    )


def worst_stage(sizes: Sizes) -> StageMemory:
    """The stage whose processes need most."""
    return max((stage_memory(sizes, stage) for stage in range(sizes.pp)), key=lambda memory: memory.total)


def _parameter_bytes(sizes: Sizes, stage: int) -> tuple[int, int, int, int, int]:
    """Weights, gradients, optimizer, what a step needs for itself, and DeepSpeed's bucket."""
    shapes = stage_parameters(sizes, stage)
    number, replicas, zero = count(shapes), sizes.replicas, sizes.run.layout.zero_stage
    share = -(-number // replicas)
    if sizes.run.training.precision == "bfloat16":
        # The float32 sums are reduced where they are.
        return 2 * number, FLOAT32 * number, 3 * FLOAT32 * share, 0, 0
    whole, part = FLOAT32 * number, FLOAT32 * share
    optimizer = 0 if sizes.run.layout.offload_optimizer else 3 * part
    largest = max(prod(shape) for shape in shapes.values())
    bucket = FLOAT32 * REDUCE_BUCKET
    if zero == 0:
        return whole, whole, 2 * whole, FLOAT32 * min(number, REDUCE_BUCKET + largest), 0
    if zero == 1:
        return whole, whole, optimizer, 2 * part, bucket
    if zero == 2:
        return whole, part, optimizer, 2 * part, bucket
    small = sum(prod(shape) for shape in shapes.values() if prod(shape) < PERSISTENT)
    weights = part + FLOAT32 * small
    return weights, part, optimizer, 2 * part, bucket


def _backward_bytes(sizes: Sizes, stage: int, chunk: int) -> int:
    """Temporaries of one chunk's backward at its peak."""
    run, element = sizes.run, sizes.element
    model, tokens = run.model, sizes.tokens
    recompute = run.training.recompute
    hidden_states = sizes.shard_tokens * model.hidden_size * element
    again = 0
    if recompute == "layer" and sizes.recomputed_chunk_layers == sizes.chunk_layers:
        again = activations.layer_bytes(sizes)  # else no more than the layers behind it kept, of which the backward came first
    elif recompute == "stage":
        again = activations.micro_batch_bytes(sizes, stage, chunk, recompute="none")
    inner, width = model.ffn_hidden_size // sizes.tp, model.head_dim
    feed_forward = tokens * 3 * inner * element
    queries = tokens * sizes.heads * width
    attention = (4 * FLOAT32 if sizes.has_memory and not sizes.kernels else 3 * element) * queries
    if sizes.has_memory and sizes.kernels:
        attention += (element + FLOAT32) * queries  # of queries that are not rotated, and the sum of those that are
    if sizes.has_memory:
        # Gradients of the states at every segment, and of what a context group exchanged.
        delta = model.update_rule == "delta"
        states = sizes.rows * sizes.segments * sizes.groups * width * width
        exchanged = sizes.cp * sizes.rows * sizes.groups * width * width if sizes.cp > 1 else 0
        attention += FLOAT32 * (2 + 2 * delta) * (states + exchanged)
        attention += (element if sizes.kernels else FLOAT32) * 3 * delta * tokens * sizes.groups * width
    inside = max(feed_forward, attention) + 2 * hidden_states
    # In bfloat16 a weight's own gradient exists beside the float32 sums until it is added to them.
    own_gradients = run.training.precision == "bfloat16"
    inside += 2 * inner * model.hidden_size * element if own_gradients else 0
    if run.layout.sequence_parallel:
        inside += tokens * model.hidden_size * element  # gathered for a weight's gradient
    if sizes.pp > 1:
        inside += 2 * hidden_states  # the gradient that was received, and the one that is sent
    if not sizes.is_last(stage, chunk):
        return again + inside
    # A gradient as wide as the logits; a chunk also has its logits and softmax, which the forward keeps where there are no
    # chunks.
    vocabulary = run.data.vocab_size // sizes.tp
    pieces = element + (2 * FLOAT32 if activations.chunks_loss(sizes) else 0)
    logits = activations.loss_chunk_tokens(sizes) * vocabulary * pieces + hidden_states
    logits += vocabulary * model.hidden_size * element if own_gradients else 0
    # The loss comes first in the backward: a layer that is computed again does not exist yet, and what the loss kept is let go
    # before the layers.
    freed = activations.output_bytes(sizes) if recompute == "layer" and again else 0
    return max(again + inside - freed, logits + (again if recompute == "stage" else 0))
