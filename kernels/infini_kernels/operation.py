"""Public operation: validates its arguments and calls a backend."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.arguments import (
    FIRST_SEGMENT_MIXES,
    UPDATE_RULES,
    Rotary,
    check_choice,
    check_eps,
    check_gate,
    check_heads,
    check_lengths,
    check_memory,
    check_normaliser,
    check_repeats,
    check_reset,
    check_rotary,
    check_segment_length,
    check_write_gate,
)
from infini_kernels.backend import BACKENDS, uses_triton
from infini_kernels.memory import MemoryState
from infini_kernels.reference import infini_attention_reference
from infini_kernels.timing import timed
from infini_kernels.variants import FEATURE_MAPS


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    memory: MemoryState | None = None,
    *,
    segment_length: int,
    update_rule: str = "linear",
    rotary: Rotary | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    first_segment: str = "paper",
    eps: float = 1e-6,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    repeats: Tensor | None = None,
    write_gate: Tensor | None = None,
    normaliser: str = "paper",
    feature_map: str = "elu",
) -> tuple[Tensor, MemoryState]:
    """Mix local softmax attention with a compressive memory of all earlier segments (arXiv 2404.07143, Eq. 3 to 10).

    Matrix products that end in the memory are full float32 only if PyTorch does not round them: leave
    `torch.set_float32_matmul_precision` at 'highest', otherwise M is accurate to three digits only.

    Args:
        q: [B, T, H, D], before rotary embedding. H is a multiple of G. q, k and v have the same floating type and device.
        k: [B, T, G, D], before rotary embedding.
        v: [B, T, G, Dv].
        gate: β [H]. The memory's share of the output is sigmoid(β): one half for β = 0.
        memory: memory that enters the first segment, M [B, G, D, Dv] and z [B, G, D], float32 (float64 for float64
            queries). None for zeros.
        segment_length: tokens of a segment. T need not be a multiple of it: a partial last segment is a segment of its own,
            and the returned memory contains it.
        update_rule: 'linear' (Eq. 8) or 'delta' (Eq. 9).
        rotary: (cos, sin), each [segment_length, D/2]. Applied to local attention only; rotates halves.
        reset: [B, ceil(T / segment_length)] bool: the memory is zeroed before that segment.
        lengths: number of valid tokens; the rest is padding. Either of each row, [B], with padding at the end of the row,
            or of each segment, [B, ceil(T / segment_length)], with padding at the end of the segment.
        first_segment: 'paper', or 'local_only' to leave A_dot unscaled where the memory that enters is empty (z = 0).
        eps: ε of the normaliser.
        backend: 'auto', 'reference' or 'triton'.
        group: processes over which the segments are spread. Each passes a contiguous run of whole segments, in rank order,
            and the same memory. Each gets the memory after the last process's run. The gradient of `memory` is the sum over
            the processes.
        repeats: [B, ceil(T / segment_length)], whole numbers of at least 1: how often each segment is written, as if it
            came that many times in a row ('delta' groups more than two writes into runs that share a normaliser). None
            writes each once.
        write_gate: u [G, D]: a token is written with strength 2 sigmoid(k · u) instead of 1. Not in the paper.
        normaliser: 'paper', or with 'delta' also 'corrected', which is not in the paper: see `variants.read_state`. M is
            then [B, G, D, Dv + 1].
        feature_map: σ: 'elu' for ELU + 1, or 'softmax', which is not in the paper: see `variants.sharp_features`.

    Returns:
        out [B, T, H, Dv] in v's type, zero at padding, and the memory after the last segment. Gradients flow through q, k,
        v, gate and both memories. Gradients of padding are zero.

    Raises:
        ValueError: shapes, types or values do not fit; the message names both sides of the conflict. Values of `lengths`
            are checked only on the CPU. `lengths` and `reset` may be on the CPU for any device of q.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("update_rule", update_rule, UPDATE_RULES)
    check_choice("first_segment", first_segment, FIRST_SEGMENT_MIXES)
    check_segment_length(segment_length)
    check_eps(eps)
    check_heads(q, k, v)
    check_gate(gate, q)
    check_write_gate(write_gate, k)
    check_normaliser(normaliser, update_rule)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_memory(memory, k, v, normaliser)
    check_rotary(rotary, q, segment_length, "segment_length")
    check_reset(reset, q.shape[0], -(-q.shape[1] // segment_length))
    check_lengths(lengths, q.shape[0], q.shape[1], segment_length)
    check_repeats(repeats, q.shape[0], -(-q.shape[1] // segment_length))
    operation = _operation(backend, q, k, v)
    with timed("memory path"):
        return operation(
            q,
            k,
            v,
            gate,
            memory,
            segment_length=segment_length,
            update_rule=update_rule,
            rotary=rotary,
            reset=reset,
            lengths=lengths,
            first_segment=first_segment,
            eps=eps,
            group=group,
            repeats=repeats,
            write_gate=write_gate,
            normaliser=normaliser,
            feature_map=feature_map,
        )


def memory_choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the name of the implementation that backend 'auto' uses for the memory of such tensors, for a log."""
    if _operation("auto", q, k, v) is infini_attention_reference:
        return f"PyTorch {torch.__version__}"
    import triton

    return f"triton {triton.__version__}"


def _operation(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, MemoryState]]:
    """Return the backend's implementation.

    Raises:
        ValueError: as for `uses_triton`.
    """
    if not uses_triton(backend, q, k, v):
        return infini_attention_reference
    from infini_kernels.triton.operation import infini_attention_triton

    return infini_attention_triton
