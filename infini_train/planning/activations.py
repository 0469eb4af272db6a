"""Bytes that a forward keeps for its backward, tensor by tensor as the layers save them.

Each term names what saves it. `tests/distributed/test_plan_memory.py` compares the sums with the tensors that autograd really
keeps.
"""

from __future__ import annotations

from infini_train.planning.sizes import FLOAT32, Sizes

INTEGER = 8
"""Bytes of a token id."""


def layer_bytes(sizes: Sizes) -> int:
    """Everything that one transformer layer keeps of one micro-batch, without the memory that enters it."""
    model, element = sizes.run.model, sizes.element
    tokens, shard = sizes.tokens, sizes.shard_tokens
    hidden, inner = model.hidden_size, model.ffn_hidden_size // sizes.tp
    queries = tokens * sizes.heads * model.head_dim
    norms = 2 * shard * (hidden * element + FLOAT32)  # their inputs, and one number a token
    products = 2 * shard * hidden * element  # what enters linear_qkv and fc1
    products += queries * element  # what enters linear_proj
    products += tokens * 3 * inner * element  # what enters SwiGLU (two halves) and fc2
    return norms + products + attention_bytes(sizes)


def attention_bytes(sizes: Sizes) -> int:
    """What core attention keeps: softmax attention, and what the memory does."""
    model, element, tokens = sizes.run.model, sizes.element, sizes.tokens
    queries, keys = tokens * sizes.heads * model.head_dim, tokens * sizes.groups * model.head_dim
    softmax = (2 * queries + 2 * keys) * element  # rotated q and k, v, and the output
    softmax += tokens * sizes.heads * FLOAT32  # logarithm of the sum of exponentials
    convolution = 0
    if model.short_convolution:  # its inputs, each segment behind as many zeros as the convolution sees tokens before it
        convolution = (queries + keys) * (model.segment_length + model.short_convolution - 1) // model.segment_length * element
    if not sizes.has_memory:
        return softmax + convolution
    memory = _memory_bytes_of_kernels if sizes.kernels else _memory_bytes_of_pytorch
    return softmax + convolution + memory(sizes, queries, keys) + _exchanged_bytes(sizes)


def _memory_bytes_of_kernels(sizes: Sizes, queries: int, keys: int) -> int:
    """Tensors of tokens are kept in their own type, and all else in float32."""
    model, groups, width = sizes.run.model, sizes.groups, sizes.run.model.head_dim
    kept = queries + queries + 2 * keys  # q as the read takes it, and what q, k and v were split from: k and v are views of it
    kept += keys if model.short_convolution else 0  # as it left the convolution
    if model.normaliser == "corrected":
        kept += sizes.tokens * groups * model.memory_value_width  # v beside a column of ones
    keys_of_states = sizes.rows * sizes.segments * groups * width
    numbers = keys_of_states * (model.memory_value_width + 1)  # M and z that enter each segment
    if model.update_rule == "delta":
        numbers += keys_of_states * width + sizes.tokens * groups  # what each segment removes, and 1 / (σ(K) z + ε)
    if model.write_strength == "learned":
        numbers += 2 * sizes.tokens * groups + keys  # strengths, and the keys they come from
    if model.feature_map == "softmax":
        numbers += sizes.tokens * (sizes.heads + groups)  # its normalisers
    return kept * sizes.element + numbers * FLOAT32


def _memory_bytes_of_pytorch(sizes: Sizes, queries: int, keys: int) -> int:
    """All of it in float32."""
    model, run = sizes.run.model, sizes.run
    rows, segments, groups = sizes.rows, sizes.segments, sizes.groups
    # A product over [row, segment, head] copies what is no view in that order. Keys and queries lie token by token, then row by
    # row, then head by head; values were copied row by row, so that what surrounds them can be let go.
    values_copied = rows * segments > 1 and groups > 1
    if model.feature_map == "softmax":  # its result lies row by row whatever it is given
        keys_copied = values_copied
        queries_copied = groups > 1 if sizes.heads > groups else keys_copied
    else:
        keys_copied = segments > 1 and rows * groups > 1
        queries_copied = rows * groups > 1 if sizes.heads > groups else keys_copied
    total = keys  # σ(K)
    total += keys if keys_copied else 0  # σ(K) in σ(K)^T V
    values = keys // model.head_dim * model.memory_value_width
    total += values if values_copied or sizes.element < FLOAT32 or values > keys else 0  # V in it
    total += queries  # σ(Q)
    total += queries if queries_copied else 0  # σ(Q) with the heads of a group side by side
    total += 2 * sizes.tokens * sizes.heads  # 1 / (σ(Q) z + ε), and the same times the gate
    keys_of_states = rows * segments * groups * model.head_dim
    states = keys_of_states * model.memory_value_width
    total += states + keys_of_states  # M and z that enter each segment
    if run.model.update_rule == "delta":
        total += keys if keys_copied else 0  # σ(K) in σ(K) z
        total += sizes.tokens * sizes.groups  # its reciprocal
        total += states + keys_of_states * model.head_dim  # M from which each segment removes, and what
    if model.write_strength == "learned":
        total += 2 * keys + 3 * sizes.tokens * sizes.groups  # K and V before their strengths, and these
    return total * FLOAT32


def _exchanged_bytes(sizes: Sizes) -> int:
    """The states of every process's run of segments and those between them, and under the delta rule the maps."""
    if sizes.cp == 1:
        return 0
    model = sizes.run.model
    each = 2 * model.memory_value_width + (model.head_dim if model.update_rule == "delta" else 0)
    return sizes.cp * sizes.rows * sizes.groups * model.head_dim * each * FLOAT32


def embedding_bytes(sizes: Sizes) -> int:
    """Token ids; over a tensor group also a mask of the ids of other processes."""
    return sizes.tokens * (INTEGER + (1 + INTEGER if sizes.tp > 1 else 0))


def loss_chunk_tokens(sizes: Sizes) -> int:
    """Tokens, over all rows, whose logits exist at one time."""
    return min(sizes.tokens, sizes.run.training.loss_chunk_tokens * sizes.rows)


def chunks_loss(sizes: Sizes) -> bool:
    """Whether a micro-batch's loss is taken in several pieces, each computed again in the backward."""
    return loss_chunk_tokens(sizes) < sizes.tokens


def output_bytes(sizes: Sizes) -> int:
    """Last norm, output layer and loss."""
    hidden, element = sizes.run.model.hidden_size, sizes.element
    total = sizes.shard_tokens * (hidden * element + FLOAT32)  # last norm
    total += sizes.tokens * hidden * element  # what enters the output layer, gathered over the tensor group
    total += sizes.tokens * FLOAT32  # loss mask
    if chunks_loss(sizes):
        return total + sizes.tokens * INTEGER  # targets
    vocabulary = sizes.run.data.vocab_size // sizes.tp
    return total + sizes.tokens * (vocabulary * FLOAT32 + 1 + INTEGER)  # softmax, mask of other ids, own ids


def micro_batch_bytes(sizes: Sizes, stage: int, chunk: int, recompute: str | None = None) -> int:
    """What one micro-batch keeps in one chunk of a stage between its forward and its backward, memory states apart.

    Args:
        recompute: training.recompute, or another in its place.
    """
    recompute = sizes.run.training.recompute if recompute is None else recompute
    hidden_states = sizes.shard_tokens * sizes.run.model.hidden_size * sizes.element
    first, last = sizes.is_first(stage, chunk), sizes.is_last(stage, chunk)
    if recompute == "stage":
        return 0 if first else hidden_states  # tokens stay on the host
    total = embedding_bytes(sizes) if first else 0
    if recompute == "layer":
        again = sizes.recomputed_chunk_layers
        total += again * hidden_states + (sizes.chunk_layers - again) * layer_bytes(sizes)
    else:
        total += sizes.chunk_layers * layer_bytes(sizes)
    return total + (output_bytes(sizes) if last else hidden_states)
