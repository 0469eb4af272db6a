"""The public operation: checks its arguments and hands them to a backend."""

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
from infini_kernels.backend import BACKENDS, takes_kernels
from infini_kernels.memory import MemoryState
from infini_kernels.reference import infini_attention_reference
from infini_kernels.timing import part
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
    """Local softmax attention mixed with a compressive memory of all earlier segments (arXiv 2404.07143, Eq. 3 to 10).

    Args:
        q: [B, T, H, D], not rotated. H is a multiple of G. q, k and v share a floating type and a device.
        k: [B, T, G, D], not rotated.
        v: [B, T, G, Dv].
        gate: [H], β. The memory's share of the output is sigmoid(β): half of it where β is 0.
        memory: what enters the first segment, M [B, G, D, Dv] and z [B, G, D] in float32 (float64 beside float64
            queries); None for zeros.
        segment_length: tokens of a segment. T need not be a multiple: a partial last segment is a segment of its own,
            and the memory returned holds it.
        update_rule: 'linear' (Eq. 8) or 'delta' (Eq. 9).
        rotary: (cos, sin), each [segment_length, D/2], applied to the local part only, halves rotated.
        reset: [B, ceil(T / segment_length)] bool: memory is zeroed before that segment.
        lengths: valid tokens, the rest is padding: of each row [B] with padding at its end, or of each segment
            [B, ceil(T / segment_length)] with padding at the end of each.
        first_segment: 'paper', or 'local_only' to leave A_dot unscaled where the memory that enters is empty (z = 0).
        eps: ε of the normaliser.
        backend: 'auto', 'reference' or 'triton'.
        group: processes over which the segments are spread: each passes a contiguous run of whole segments, in rank order, and
            the same memory; each gets the memory after the last process's run. Its gradient is the sum over the processes.
        repeats: [B, ceil(T / segment_length)], whole numbers of at least 1: how often each segment is written, as if it came so
            many times in a row ('delta' walks more than two in runs that share a normaliser). None writes each once.
        write_gate: u [G, D]: a token is written with strength 2 sigmoid(k · u) and not with 1. Not in the paper.
        normaliser: 'paper', or for 'delta' 'corrected', which is not in the paper: see `variants.read_state`. The memory's M is
            then [B, G, D, Dv + 1].
        feature_map: σ, 'elu' for ELU + 1, or 'softmax', which is not in the paper: see `variants.sharp_features`.

    Products that end in the memory are float32's own only while PyTorch is not told to round them: leave
    `torch.set_float32_matmul_precision` at 'highest', or M is good to three digits.

    Returns:
        out [B, T, H, Dv] in v's type, zero at padding, and the memory after the last segment. Gradients flow through q,
        k, v, gate and both ends of the memory; those of padding are zero.

    Raises:
        ValueError: shapes, types or values that do not fit, named together with what they conflict with. Values of
            `lengths` are checked where it is on the CPU; it and `reset` may be there whatever q's device.
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
    with part("memory path"):
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
    """What computes the memory of tensors like these with backend 'auto', for a log."""
    if _operation("auto", q, k, v) is infini_attention_reference:
        return f"PyTorch {torch.__version__}"
    import triton

    return f"triton {triton.__version__}"


def _operation(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, MemoryState]]:
    """The backend's version. Raises ValueError as `takes_kernels` does."""
    if not takes_kernels(backend, q, k, v):
        return infini_attention_reference
    from infini_kernels.triton import infini_attention_triton

    return infini_attention_triton
