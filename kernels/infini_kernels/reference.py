"""Infini-attention in plain PyTorch operations: the specification for faster implementations.

Shapes: B batch, T tokens, N segments, W tokens of a segment in this call, H query heads, G key/value heads, D key width, Dv
value width.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.arguments import Rotary, values_known
from infini_kernels.compressive import PlainUpdates, SegmentMemory, full_precision, read_and_mix, sigma
from infini_kernels.memory import MemoryState, memory_dtype
from infini_kernels.segments import SegmentLayout, padding_mask, to_device
from infini_kernels.softmax_attention import segment_attention
from infini_kernels.variants import read_state, remembered_values, write_strength


def infini_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    memory: MemoryState | None,
    *,
    segment_length: int,
    update_rule: str,
    rotary: Rotary | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    first_segment: str,
    eps: float,
    group: ProcessGroup | None = None,
    repeats: Tensor | None = None,
    write_gate: Tensor | None = None,
    normaliser: str = "paper",
    feature_map: str = "elu",
) -> tuple[Tensor, MemoryState]:
    """Compute `infini_attention` for arguments that have been checked."""
    dtype = memory_dtype(v.dtype)
    layout = SegmentLayout.of(q.shape[1], segment_length)
    padding = padding_mask(lengths, q.shape[1], segment_length, q.device)  # [B, T, 1, 1]
    if padding is not None:
        # Zero the padding instead of only masking it in sums: padding may contain NaN, and 0 * NaN is NaN.
        q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
    if v.requires_grad:
        # Autograd saves v itself. If q, k and v are views of one tensor, a copy of v lets that tensor be freed.
        v = v.contiguous()
    if reset is not None:
        reset = None if values_known(reset) and not bool(reset.any()) else to_device(reset, q.device)

    with full_precision(q):
        sigma_k = sigma(k, dtype, feature_map)  # [B, T, G, D]
        if padding is not None:
            sigma_k = sigma_k.masked_fill(padding, 0)  # σ(0) is not 0, so a zero key would still be written
        strength = write_strength(k, write_gate, dtype)  # [B, T, G, 1]
        values = layout.fold(remembered_values(v.to(dtype), normaliser))
        updates = PlainUpdates(layout.fold(sigma_k), values, None if strength is None else layout.fold(strength))
        written = SegmentMemory(updates, memory, reset, update_rule, eps, group, repeats)
    # Computed here so that it overlaps with the exchange of a group, which is now in progress.
    local = segment_attention(layout.fold(q), layout.fold(k), layout.fold(v), rotary)  # [B, N, W, H, Dv]
    with full_precision(q):
        carried = written.carry()
        sigma_q = layout.fold(sigma(q, dtype, feature_map))  # [B, N, W, H, D]
        entering = None if carried.entering is None else read_state(carried.entering, normaliser)
        mixed = read_and_mix(sigma_q, local, gate, entering, first_segment, eps)
    out = layout.unfold(mixed).to(v.dtype)  # [B, T, H, Dv]
    if padding is not None:
        out = out.masked_fill(padding, 0)
    return out, carried.leaving
