"""GPU memory of one process of a stage, by category.

Weights, gradients and optimizer follow DeepSpeed's memory use in each ZeRO stage. In the table, p is the number of the stage's
parameters on one process. r is the number of processes with the same parameters (data times context parallelism). Entries
are bytes:

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
"""Elements of the gradient bucket that DeepSpeed allocates with ZeRO 1 to 3 (its default `reduce_bucket_size`)."""
PERSISTENT = 100_000
"""ZeRO-3 does not shard parameters with fewer elements (its default `stage3_param_persistence_threshold`)."""


@dataclass(frozen=True)
class StageMemory:
    """GPU memory in bytes on one process of a stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    per_micro_batch: int
    """Activations of one micro-batch in flight, as the mean over the chunks of the stage."""
    in_flight: int
    """Largest number of micro-batches between forward and backward, counted once per chunk."""
    activations: int
    """Activations of all micro-batches in flight."""
    memory_states: int
    """States M and z that enter and leave the micro-batches in flight, and their gradients in a backward pass."""
    backward_buffers: int
    """Temporary tensors of a backward pass at its peak: recomputed activations, logits, gradients inside a layer."""
    step_buffers: int
    """Temporary tensors of gradient reduction and the optimizer step, when activations are already freed."""
    constant_buffers: int
    """Rotary tables and DeepSpeed's gradient bucket."""

    @property
    def buffers(self) -> int:
        """Return the bytes of the peak that the other categories do not include."""
        return self.total - self.weights - self.gradients - self.optimizer - self.activations - self.memory_states

    @property
    def total(self) -> int:
        """Return the peak, either in a backward pass with the most micro-batches in flight or in the optimizer step."""
        static = self.weights + self.gradients + self.optimizer + self.constant_buffers + self.memory_states
        return static + max(self.activations + self.backward_buffers, self.step_buffers)


def stage_memory(sizes: Sizes, stage: int) -> StageMemory:
    """Return the GPU memory of one process of a stage."""
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
    """Return the GPU memory of the stage whose processes need the most."""
    return max((stage_memory(sizes, stage) for stage in range(sizes.pp)), key=lambda memory: memory.total)


def _parameter_bytes(sizes: Sizes, stage: int) -> tuple[int, int, int, int, int]:
    """Return the bytes of weights, gradients, optimizer, temporary tensors of a step, and DeepSpeed's bucket."""
    shapes = stage_parameters(sizes, stage)
    number, replicas, zero = count(shapes), sizes.replicas, sizes.run.layout.zero_stage
    share = -(-number // replicas)
    if sizes.run.training.precision == "bfloat16":
        # The float32 gradient sums are reduced in place.
        return 2 * number, FLOAT32 * number, 3 * FLOAT32 * share, 0, 0
    full, shard = FLOAT32 * number, FLOAT32 * share
    optimizer = 0 if sizes.run.layout.offload_optimizer else 3 * shard
    largest = max(prod(shape) for shape in shapes.values())
    bucket = FLOAT32 * REDUCE_BUCKET
    if zero == 0:
        return full, full, 2 * full, FLOAT32 * min(number, REDUCE_BUCKET + largest), 0
    if zero == 1:
        return full, full, optimizer, 2 * shard, bucket
    if zero == 2:
        return full, shard, optimizer, 2 * shard, bucket
    small = sum(prod(shape) for shape in shapes.values() if prod(shape) < PERSISTENT)
    weights = shard + FLOAT32 * small
    return weights, shard, optimizer, 2 * shard, bucket


def _backward_bytes(sizes: Sizes, stage: int, chunk: int) -> int:
    """Return the bytes of the temporary tensors of one chunk's backward pass at its peak."""
    run, element = sizes.run, sizes.element
    model, tokens = run.model, sizes.tokens
    recompute = run.training.recompute
    hidden_states = sizes.shard_tokens * model.hidden_size * element
    again = 0
    if recompute == "layer" and sizes.recomputed_chunk_layers == sizes.chunk_layers:
        # With partial recomputation, this layer needs at most the bytes that later layers saved and have already freed.
        again = activations.layer_bytes(sizes)
    elif recompute == "stage":
        again = activations.micro_batch_bytes(sizes, stage, chunk, recompute="none")
    inner, width = model.ffn_hidden_size // sizes.tp, model.head_dim
    feed_forward = tokens * 3 * inner * element
    queries = tokens * sizes.heads * width
    attention = (4 * FLOAT32 if sizes.has_memory and not sizes.kernels else 3 * element) * queries
    if sizes.has_memory and sizes.kernels:
        attention += (element + FLOAT32) * queries  # gradients of unrotated queries, and the sum for rotated ones
    if sizes.has_memory:
        # Gradients of the states at every segment, and of the states that a context group exchanged.
        delta = model.update_rule == "delta"
        states = sizes.rows * sizes.segments * sizes.groups * width * width
        exchanged = sizes.cp * sizes.rows * sizes.groups * width * width if sizes.cp > 1 else 0
        attention += FLOAT32 * (2 + 2 * delta) * (states + exchanged)
        attention += (element if sizes.kernels else FLOAT32) * 3 * delta * tokens * sizes.groups * width
    inside = max(feed_forward, attention) + 2 * hidden_states
    # In bfloat16, the gradient of a weight exists until it is added to the float32 sum.
    own_gradients = run.training.precision == "bfloat16"
    inside += 2 * inner * model.hidden_size * element if own_gradients else 0
    if run.layout.sequence_parallel:
        inside += tokens * model.hidden_size * element  # input gathered for the gradient of a weight
    if sizes.pp > 1:
        inside += 2 * hidden_states  # the received gradient and the sent gradient
    if not sizes.is_last(stage, chunk):
        return again + inside
    # The gradient of the logits. A chunked loss also recomputes logits and softmax; else the forward pass saves them.
    vocabulary = run.data.vocab_size // sizes.tp
    pieces = element + (2 * FLOAT32 if activations.chunks_loss(sizes) else 0)
    logits = activations.loss_chunk_tokens(sizes) * vocabulary * pieces + hidden_states
    logits += vocabulary * model.hidden_size * element if own_gradients else 0
    # The backward pass starts with the loss. At that time no layer is recomputed yet. The saved tensors of the loss are freed
    # before the backward pass of the layers.
    freed = activations.output_bytes(sizes) if recompute == "layer" and again else 0
    return max(again + inside - freed, logits + (again if recompute == "stage" else 0))
