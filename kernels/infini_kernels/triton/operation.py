"""Infini-attention with Triton kernels: `infini_kernels.reference` with each pass over the tokens fused.

Shapes: B batch, T tokens, N segments, W tokens of a segment in this call, H query heads, G key/value heads, D key width, Dv
value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.ageing import Removals
from infini_kernels.arguments import Rotary, values_known
from infini_kernels.compressive import SegmentMemory, full_precision
from infini_kernels.memory import MemoryState
from infini_kernels.segments import SegmentLayout, all_full, lengths_by_segment, padding_mask, to_device
from infini_kernels.softmax_attention import segment_attention
from infini_kernels.timing import timed, timed_as
from infini_kernels.triton.blocks import SMALLEST, next_power_of_2
from infini_kernels.triton.features import softmax_shift
from infini_kernels.triton.read import read_and_mix, read_and_mix_in_place
from infini_kernels.triton.removal import segment_removals
from infini_kernels.triton.rotary import rotate, with_rotated
from infini_kernels.triton.states import segment_states
from infini_kernels.triton.walk import walk_segments, walk_sums
from infini_kernels.variants import read_state, remembered_values, write_strength


def infini_attention_triton(
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
    """Compute `infini_attention` for arguments that have been checked and that `blocks.supports`."""
    layout = SegmentLayout.of(q.shape[1], segment_length)
    tokens = tokens_by_segment(lengths, layout, q, segment_length)
    padding = padding_mask(lengths, layout.num_tokens, segment_length, q.device)
    if reset is not None:
        # Most micro-batches have no reset, and the host knows that without asking the device.
        none = values_known(reset) and not any(reset.flatten().tolist())
        reset = None if none else to_device(reset, q.device).to(torch.int8).contiguous()
    queries, keys = q, k
    if rotary is not None:
        q, k, queries, keys = original_and_rotated(q, k, rotary, tokens, layout)
    width = compiled_width(layout, segment_length)
    with full_precision(q):
        # Padding may contain NaN, and its gradient would be 0 * NaN.
        real = k if padding is None or write_gate is None else k.masked_fill(padding, 0)
        strength = write_strength(real, write_gate, torch.float32)
        strength = None if strength is None else strength.squeeze(-1)
        shift = _shift(k, feature_map)
        updates = KernelUpdates(k, remembered_values(v, normaliser), tokens, width, shift, strength)
        written = SegmentMemory(updates, memory, reset, update_rule, eps, group, repeats)
    # Computed here so that it overlaps with the exchange of a group, which is now in progress.
    local = attend(queries, keys, v, rotary is not None, padding, layout).to(v.dtype)  # its type differs under autocast
    with full_precision(q):
        carried = written.carry()
        entering = carried.entering or MemoryState(torch.zeros_like(updates.written), torch.zeros_like(updates.z))
        M, z = read_state(entering, normaliser)
        reading = (q, local, gate, M, z, tokens, width, first_segment == "local_only", eps, _shift(q, feature_map))
        if torch.is_grad_enabled() or not local.is_contiguous():
            return read_and_mix(*reading), carried.leaving
        read_and_mix_in_place(*reading)
    return local, carried.leaving


def compiled_width(layout: SegmentLayout, segment_length: int) -> int:
    """Return the W for which kernels are compiled.

    A single segment that is not full counts as one with the next power of two tokens, which `tokens` masks. Calls of all
    lengths below segment_length then need few compiled kernels.
    """
    if layout.width == segment_length:
        return segment_length
    return min(segment_length, max(SMALLEST, next_power_of_2(layout.width)))


def _shift(x: Tensor, feature_map: str) -> Tensor | None:
    """Return the shift that `features.sigma` needs for this feature map."""
    return None if feature_map == "elu" else softmax_shift(x.detach())


class KernelUpdates:
    """`compressive.SegmentUpdates` with kernels, which read keys without a copy.

    Args:
        k: [B, T, G, D].
        v: [B, T, G, Dv].
        tokens: [B, N] int32, valid tokens of each segment.
        width: tokens of a segment.
        shift: [B, T, G]; None for ELU + 1.
        strength: [B, T, G]; None for writes of strength 1.
    """

    def __init__(
        self, k: Tensor, v: Tensor, tokens: Tensor, width: int, shift: Tensor | None = None, strength: Tensor | None = None
    ) -> None:
        self._k, self._tokens, self._width, self._shift, self._strength = k, tokens, width, shift, strength
        self.written, self.z = segment_states(k, v, tokens, width, shift, strength)

    def select(self, places: Tensor | None) -> Removals:
        """Return the removals of the segments b N + n listed in places, in that order.

        None selects all segments.
        """
        tokens = self._tokens.flatten()
        whole = places is None
        if places is None:
            places = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        else:
            tokens = tokens.index_select(0, places)
        return KernelRemovals(self._k, places.int(), tokens, self._width, self._shift, self._strength, whole)

    def walk(self, state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run `recurrence.walk`."""
        if removed is None and added.shape[1] == 1:  # a single addition
            if reset is not None:
                state = state.masked_fill(reset.bool().view(-1, *[1] * (state.dim() - 1)), 0)
            return state.unsqueeze(1), state + added.squeeze(1)
        entering, leaving = walk_segments(state, added, reset, removed, False)
        return entering, leaving

    def walk_both(self, memory: MemoryState, added: MemoryState, reset: Tensor | None) -> tuple[MemoryState, MemoryState]:
        """Run `compressive.SegmentUpdates.walk_both`."""
        if added.M.shape[1] == 1:
            both = (self.walk(state, more, reset) for state, more in ((memory.M, added.M), (memory.z, added.z)))
            (entering_M, leaving_M), (entering_z, leaving_z) = both
        else:
            entering_M, entering_z, leaving_M, leaving_z = walk_sums(*memory, *added, reset, False)
        return MemoryState(entering_M, entering_z), MemoryState(leaving_M, leaving_z)


class KernelRemovals:
    """`ageing.Removals` with kernels.

    Args:
        rows: [X] int32, the segments as b N + n.
        tokens: [X] int32, their valid tokens.
        whole: rows are all segments in order.
    """

    def __init__(
        self, k: Tensor, rows: Tensor, tokens: Tensor, width: int, shift: Tensor | None, strength: Tensor | None, whole: bool
    ) -> None:
        self._k, self._rows, self._tokens, self._width, self._shift, self._strength = k, rows, tokens, width, shift, strength
        self._whole = whole

    def removal(self, z: Tensor, eps: float) -> Tensor:
        """Implement `ageing.Removals.removal`."""
        rows, tokens = self._rows[: len(z)], self._tokens[: len(z)]
        return segment_removals(self._k, z, rows, tokens, self._width, eps, self._shift, self._strength, self._whole)[0]

    def removals(self, z: Tensor, dz: Tensor, times: list[Tensor], eps: float) -> list[Tensor]:
        """Implement `ageing.Removals.removals`."""
        return [self.removal(z[: len(t)] + t[:, None, None] * dz[: len(t)], eps) for t in times]


def tokens_by_segment(lengths: Tensor | None, layout: SegmentLayout, q: Tensor, segment_length: int) -> Tensor:
    """Return the number of valid (not padding) tokens of each segment, [B, N] int32 on q's device."""
    given = None if lengths is None else lengths_by_segment(lengths, layout.num_tokens, segment_length)
    if given is not None and all_full(given, layout.num_tokens):
        given = None
    if given is None:
        present = torch.full((q.shape[0], layout.num_segments), layout.width, dtype=torch.int32, device=q.device)
        if last := layout.num_tokens % layout.width:
            present[:, -1] = last
        return present
    starts = torch.arange(layout.num_segments, device=q.device if given is None else given.device) * layout.width
    present = (layout.num_tokens - starts).clamp(max=layout.width).expand(q.shape[0], -1)
    if given is not None:
        present = torch.minimum(present, given)
    return to_device(present, q.device).to(torch.int32).contiguous()


@timed_as("local attention")
def original_and_rotated(
    q: Tensor, k: Tensor, rotary: Rotary, tokens: Tensor, layout: SegmentLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries and keys unchanged, and both rotated."""
    return with_rotated(q, k, *rotary, tokens, layout.width)


def local_half(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, tokens: Tensor, padding: Tensor | None, layout: SegmentLayout
) -> Tensor:
    """Compute segment-local attention [B, T, H, Dv] of q and k before rotary embedding."""
    if rotary is not None:
        with timed("local attention"):
            q, k = rotate(q, k, None, None, *rotary, tokens, layout.width, 1)
    return attend(q, k, v, rotary is not None, padding, layout)


@timed_as("local attention")
def attend(q: Tensor, k: Tensor, v: Tensor, rotated: bool, padding: Tensor | None, layout: SegmentLayout) -> Tensor:
    """Compute segment-local attention [B, T, H, Dv].

    Padding may contain NaN, so it is zeroed first. Rotation has already zeroed it in q and k.
    """
    if padding is not None:
        q, k = (q, k) if rotated else (x.masked_fill(padding, 0) for x in (q, k))
        v = v.masked_fill(padding, 0)
    return layout.unfold(segment_attention(layout.fold(q), layout.fold(k), layout.fold(v), None))
