"""Activation memory: bytes that a forward pass saves for its backward pass, tensor by tensor.

A comment on each term names the operation that saves it. `tests/distributed/test_plan_memory.py` compares the sums with the
tensors that autograd saves in a real run.
"""

from __future__ import annotations

from infini_train.planning.sizes import FLOAT32, Sizes

INTEGER = 8
"""Bytes of a token id."""


def layer_bytes(sizes: Sizes) -> int:
    """Return the bytes that one transformer layer saves for one micro-batch, without the memory state that enters the layer."""
    model, element = sizes.run.model, sizes.element
    tokens, shard = sizes.tokens, sizes.shard_tokens
    hidden, inner = model.hidden_size, model.ffn_hidden_size // sizes.tp
    queries = tokens * sizes.heads * model.head_dim
    norms = 2 * shard * (hidden * element + FLOAT32)  # inputs, and one number per token
    products = 2 * shard * hidden * element  # inputs of linear_qkv and fc1
    products += queries * element  # input of linear_proj
    products += tokens * 3 * inner * element  # inputs of SwiGLU (two halves) and fc2
    return norms + products + attention_bytes(sizes)


def attention_bytes(sizes: Sizes) -> int:
    """Return the bytes that core attention saves: softmax attention, the short convolution and the compressive memory."""
    model, element, tokens = sizes.run.model, sizes.element, sizes.tokens
    queries, keys = tokens * sizes.heads * model.head_dim, tokens * sizes.groups * model.head_dim
    softmax = (2 * queries + 2 * keys) * element  # rotated q and k, v, and the output
    softmax += tokens * sizes.heads * FLOAT32  # log-sum-exp
    convolution = 0
    if model.short_convolution:  # its inputs; each segment is padded on the left with `short_convolution - 1` zeros
        convolution = (queries + keys) * (model.segment_length + model.short_convolution - 1) // model.segment_length * element
    if not sizes.has_memory:
        return softmax + convolution
    memory = _memory_bytes_of_kernels if sizes.kernels else _memory_bytes_of_pytorch
    return softmax + convolution + memory(sizes, queries, keys) + _exchanged_bytes(sizes)


def _memory_bytes_of_kernels(sizes: Sizes, queries: int, keys: int) -> int:
    """Return the bytes that the Triton kernels save. Per-token tensors keep the run's precision; all others are float32."""
    model, groups, width = sizes.run.model, sizes.groups, sizes.run.model.head_dim
    kept = queries + queries + 2 * keys  # q of the read, and the fused qkv tensor; k and v are views of it
    kept += keys if model.short_convolution else 0  # output of the convolution
    if model.normaliser == "corrected":
        kept += sizes.tokens * groups * model.memory_value_width  # v with a column of ones
    keys_of_states = sizes.rows * sizes.segments * groups * width
    numbers = keys_of_states * (model.memory_value_width + 1)  # M and z at the start of each segment
    if model.update_rule == "delta":
        numbers += keys_of_states * width + sizes.tokens * groups  # the term each segment removes, and 1 / (σ(K) z + ε)
    if model.write_strength == "learned":
        numbers += 2 * sizes.tokens * groups + keys  # write strengths, and the keys that they are computed from
    if model.feature_map == "softmax":
        numbers += sizes.tokens * (sizes.heads + groups)  # normalisers of the softmax
    return kept * sizes.element + numbers * FLOAT32


def _memory_bytes_of_pytorch(sizes: Sizes, queries: int, keys: int) -> int:
    """Return the bytes that the PyTorch implementation of the memory saves, all in float32."""
    model, run = sizes.run.model, sizes.run
    rows, segments, groups = sizes.rows, sizes.segments, sizes.groups
    # A batched product over [row, segment, head] copies operands that are not views in that order. Keys and queries are
    # stored by token, then row, then head. Values were copied by row, so that the tensor around them can be freed.
    values_copied = rows * segments > 1 and groups > 1
    if model.feature_map == "softmax":  # the output is stored by row for every input order
        keys_copied = values_copied
        queries_copied = groups > 1 if sizes.heads > groups else keys_copied
    else:
        keys_copied = segments > 1 and rows * groups > 1
        queries_copied = rows * groups > 1 if sizes.heads > groups else keys_copied
    total = keys  # σ(K)
    total += keys if keys_copied else 0  # σ(K) in σ(K)^T V
    values = keys // model.head_dim * model.memory_value_width
    total += values if values_copied or sizes.element < FLOAT32 or values > keys else 0  # V in the same product
    total += queries  # σ(Q)
    total += queries if queries_copied else 0  # σ(Q) with the heads of a group side by side
    total += 2 * sizes.tokens * sizes.heads  # 1 / (σ(Q) z + ε), and the same times the gate
    keys_of_states = rows * segments * groups * model.head_dim
    states = keys_of_states * model.memory_value_width
    total += states + keys_of_states  # M and z at the start of each segment
    if run.model.update_rule == "delta":
        total += keys if keys_copied else 0  # σ(K) in σ(K) z
        total += sizes.tokens * sizes.groups  # the reciprocal of σ(K) z
        total += states + keys_of_states * model.head_dim  # M before the removal, and the term that is removed
    if model.write_strength == "learned":
        total += 2 * keys + 3 * sizes.tokens * sizes.groups  # K and V before scaling by the write strengths, and the strengths
    return total * FLOAT32


def _exchanged_bytes(sizes: Sizes) -> int:
    """Return the bytes saved for context parallelism.

    A rank saves the states of every rank's segments and the states between ranks. The delta rule adds the memory maps.
    """
    if sizes.cp == 1:
        return 0
    model = sizes.run.model
    each = 2 * model.memory_value_width + (model.head_dim if model.update_rule == "delta" else 0)
    return sizes.cp * sizes.rows * sizes.groups * model.head_dim * each * FLOAT32


def embedding_bytes(sizes: Sizes) -> int:
    """Return the bytes that the embedding saves: token ids; with tensor parallelism also a mask of ids held by other ranks."""
    return sizes.tokens * (INTEGER + (1 + INTEGER if sizes.tp > 1 else 0))


def loss_chunk_tokens(sizes: Sizes) -> int:
    """Return the number of tokens, over all rows, whose logits exist at the same time."""
    return min(sizes.tokens, sizes.run.training.loss_chunk_tokens * sizes.rows)


def chunks_loss(sizes: Sizes) -> bool:
    """Return whether the loss of a micro-batch is computed in several chunks, each recomputed in the backward pass."""
    return loss_chunk_tokens(sizes) < sizes.tokens


def output_bytes(sizes: Sizes) -> int:
    """Return the bytes that the final norm, the output layer and the loss save."""
    hidden, element = sizes.run.model.hidden_size, sizes.element
    total = sizes.shard_tokens * (hidden * element + FLOAT32)  # final norm
    total += sizes.tokens * hidden * element  # input of the output layer, gathered over the tensor group
    total += sizes.tokens * FLOAT32  # loss mask
    if chunks_loss(sizes):
        return total + sizes.tokens * INTEGER  # targets
    vocabulary = sizes.run.data.vocab_size // sizes.tp
    return total + sizes.tokens * (vocabulary * FLOAT32 + 1 + INTEGER)  # softmax, mask of ids on other ranks, local ids


def micro_batch_bytes(sizes: Sizes, stage: int, chunk: int, recompute: str | None = None) -> int:
    """Return the bytes that one micro-batch saves in one chunk of a stage from forward to backward, without memory states.

    Args:
        recompute: replaces `training.recompute` if given.
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
