"""Reading, writing and carrying the compressive memory (arXiv 2404.07143, Eq. 3, 4, 8, 9 and 10).

Everything here runs in the memory's own type, float32 (float64 for verification), whatever surrounds it.

Shapes: B batch, N segments, W tokens of a segment in this call, H query heads, G key/value heads, R = H/G, D key width,
Dv value width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.ageing import PlainRemovals, Removals, repeated_removal
from infini_kernels.backward import FeatureMap, ScaledProduct
from infini_kernels.context_parallel import RunExchange
from infini_kernels.memory import MemoryState
from infini_kernels.recurrence import walk
from infini_kernels.segments import to_device
from infini_kernels.variants import sharp_features


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Switches off an autocast around memory arithmetic: it would run the matrix products in a half type."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def sigma(x: Tensor, dtype: torch.dtype, feature_map: str = "elu") -> Tensor:
    """σ(x) over the last dimension in the memory's type: the paper's ELU(x) + 1, or `variants.sharp_features`."""
    x = x.to(dtype)
    return FeatureMap.apply(x) if feature_map == "elu" else sharp_features(x)


class CarriedMemory(NamedTuple):
    """Memory along N segments: what enters each (None: nothing enters the only one), and what leaves the last."""

    entering: MemoryState | None  # M [B, N, G, D, Dv], z [B, N, G, D]
    leaving: MemoryState  # M [B, G, D, Dv], z [B, G, D]


class SegmentUpdates(Protocol):
    """What each segment does to the memory; made once for all segments, from keys and values.

    Attributes:
        written: σ(K)^T V, [B, N, G, D, Dv].
        z: Σ σ(K), [B, N, G, D].
    """

    written: Tensor
    z: Tensor

    def select(self, places: Tensor | None) -> Removals:
        """What the segments b N + n of these places [X] remove, in their order; None takes all."""
        ...

    def walk(self, state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `recurrence.walk`."""
        ...

    def walk_both(self, memory: MemoryState, added: MemoryState, reset: Tensor | None) -> tuple[MemoryState, MemoryState]:
        """`walk` of M and of z where nothing is removed: what enters each segment, and what leaves the last."""
        ...


class PlainUpdates:
    """`SegmentUpdates` in PyTorch's own operations.

    sigma_k [B, N, W, G, D], zero at padding; v [B, N, W, G, Dv]; strength [B, N, W, G, 1] of each write, None for 1

    With strengths s, σ(K)^T diag(s) stands in every place of the σ(K)^T that writes.
    """

    def __init__(self, sigma_k: Tensor, v: Tensor, strength: Tensor | None = None) -> None:
        self._sigma_k_t = sigma_k.permute(0, 1, 3, 4, 2)  # [B, N, G, D, W]
        self._strength = None if strength is None else strength.permute(0, 1, 3, 4, 2)  # [B, N, G, 1, W]
        if strength is None:
            self.written = self._sigma_k_t @ v.permute(0, 1, 3, 2, 4)
            self.z = sigma_k.sum(dim=2)
        else:
            self.written = self._sigma_k_t @ (v * strength).permute(0, 1, 3, 2, 4)
            self.z = (sigma_k * strength).sum(dim=2)

    def select(self, places: Tensor | None) -> Removals:
        def chosen(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if places is None else x.flatten(0, 1).index_select(0, places)

        return PlainRemovals(chosen(self._sigma_k_t), None if self._strength is None else chosen(self._strength))

    def walk(self, state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return walk(state, added, reset, removed)

    def walk_both(self, memory: MemoryState, added: MemoryState, reset: Tensor | None) -> tuple[MemoryState, MemoryState]:
        entering, leaving = zip(*(walk(state, more, reset) for state, more in zip(memory, added, strict=True)), strict=True)
        return MemoryState(*entering), MemoryState(*leaving)


class SegmentMemory:
    """Carries the memory over the segments: both rules are M_s = T_s M_{s-1} + B_s once z is known (Eq. 8 and 9).

        linear  B_s = σ(K)^T V, T_s = I
        delta   B_s = σ(K)^T V, T_s = I - σ(K)^T diag(1 / (σ(K) z_{s-1} + ε)) σ(K)

    B_s and T_s come for all segments at once from the keys; only states of D x Dv are walked. With a group the exchange
    between its processes is under way from here to `carry`, so that other work can overlap with it.

    memory that enters the first segment, None for zeros; reset [B, N] bool, the memory is zeroed before that segment; group:
    processes over which the segments are spread, None if they are all here; repeats [B, N], how often each segment's update
    counts, None for once.
    """

    def __init__(
        self,
        updates: SegmentUpdates,
        memory: MemoryState | None,
        reset: Tensor | None,
        update_rule: str,
        eps: float,
        group: ProcessGroup | None = None,
        repeats: Tensor | None = None,
    ) -> None:
        batch_size, num_segments, num_groups, key_width, value_width = updates.written.shape
        self._written, self._written_z = updates.written, updates.z
        if repeats is not None:
            counts = to_device(repeats, updates.z.device).to(updates.z.dtype)[:, :, None, None]
            self._written_z = counts * updates.z
            if update_rule == "linear":
                self._written = counts.unsqueeze(-1) * self._written
        self._walk, self._walk_both, self._reset, self._group = updates.walk, updates.walk_both, reset, group
        self._nothing_enters = memory is None and num_segments == 1 and group is None and repeats is None
        if self._nothing_enters:
            return
        if memory is None:
            size = batch_size, num_groups, key_width, value_width
            memory = MemoryState.zeros(*size, device=updates.z.device, dtype=updates.z.dtype)
        self._memory = memory
        if group is not None:
            kept = _kept(reset, self._written)[:, None, None].expand(-1, num_groups, 1)
            _, run_z = self._walk(torch.zeros_like(memory.z), self._written_z, reset)
            self._exchange_z = RunExchange(kept, run_z, group)
        self._carried_z: tuple[Tensor, Tensor] | None = None
        self._removed = None
        if update_rule == "delta":  # M needs z here, so z is waited for
            self._carried_z = self._carry_z()
            entering_z = self._carried_z[0]
            if repeats is None:
                self._removed = updates.select(None).removal(entering_z.flatten(0, 1), eps).unflatten(0, entering_z.shape[:2])
            else:
                self._removed, self._written = repeated_removal(updates, entering_z, repeats, eps)
        if group is not None:
            factor = kept.unsqueeze(2).expand(-1, -1, key_width, 1)
            if self._removed is not None:
                factor = self._transition(self._removed)
            _, run_M = self._walk(torch.zeros_like(memory.M), self._written, reset, self._removed)
            self._exchange_M = RunExchange(factor, run_M, group)

    def _carry_z(self) -> tuple[Tensor, Tensor]:
        """z that enters each segment [B, N, G, D], and that leaves the last."""
        if self._group is None:
            return self._walk(self._memory.z, self._written_z, self._reset)
        first, leaving = self._exchange_z.fold(self._memory.z)
        return self._walk(first, self._written_z, self._reset)[0], leaving

    def carry(self) -> CarriedMemory:
        """Waits for the exchange and walks the memory over the segments."""
        if self._nothing_enters:
            return CarriedMemory(None, MemoryState(self._written[:, 0], self._written_z[:, 0]))
        if self._group is None and self._carried_z is None:
            return CarriedMemory(*self._walk_both(self._memory, MemoryState(self._written, self._written_z), self._reset))
        entering_z, leaving_z = self._carried_z or self._carry_z()
        first, leaving_M = (self._memory.M, None) if self._group is None else self._exchange_M.fold(self._memory.M)
        entering_M, last_M = self._walk(first, self._written, self._reset, self._removed)
        leaving_M = last_M if leaving_M is None else leaving_M
        return CarriedMemory(MemoryState(entering_M, entering_z), MemoryState(leaving_M, leaving_z))

    def _transition(self, removed: Tensor) -> Tensor:
        """T of all segments together under the delta rule, [B, G, D, D]: what they do to the memory that enters the first."""
        identity = torch.eye(removed.shape[-1], dtype=removed.dtype, device=removed.device).expand_as(removed[:, 0])
        return self._walk(identity, torch.zeros_like(removed), self._reset, removed)[1]


def _kept(reset: Tensor | None, like: Tensor) -> Tensor:
    """1 for rows in which no segment resets, else 0: [B], in the memory's type."""
    if reset is None:
        return torch.ones(like.shape[0], dtype=like.dtype, device=like.device)
    return (~reset.any(dim=1)).to(like)


def read_and_mix(
    sigma_q: Tensor,
    local: Tensor,
    gate: Tensor,
    entering: MemoryState | None,
    first_segment: str,
    eps: float,
) -> Tensor:
    """A = sigmoid(β) σ(Q) M_{s-1} / (σ(Q) z_{s-1} + ε) + (1 - sigmoid(β)) A_dot (Eq. 3 and 10).

    sigma_q [B, N, W, H, D]; local A_dot [B, N, W, H, Dv]; gate [H]; entering M [B, N, G, D, Dv], z [B, N, G, D], or
    None for an empty memory -> [B, N, W, H, Dv] in the memory's type. With first_segment 'local_only', heads whose
    memory is empty (z = 0) keep A_dot unscaled.
    """
    num_heads = gate.shape[0]
    share = gate.to(sigma_q.dtype).sigmoid()  # [H]
    if entering is None:
        if first_segment == "local_only":
            share = share * 0  # a product and not a constant: the gate stays in the graph, its gradient is zero
        return local * (1 - share).unsqueeze(-1)

    num_groups = entering.z.shape[2]
    heads_per_group = num_heads // num_groups
    share = share.view(1, 1, 1, num_groups, heads_per_group, 1)
    if first_segment == "local_only":
        filled = entering.z.ne(0).any(dim=-1)  # [B, N, G]
        share = share * filled[:, :, None, :, None, None]  # [B, N, 1, G, R, 1]

    width = sigma_q.shape[2]
    grouped_q = sigma_q.unflatten(3, (num_groups, heads_per_group)).transpose(2, 3).flatten(3, 4)  # [B, N, G, W*R, D]
    scale = (grouped_q @ entering.z.unsqueeze(-1) + eps).reciprocal()  # [B, N, G, W*R, 1]
    # The share goes into the scale, one number per token and head, to save a pass over the values.
    scale = (scale.unflatten(3, (width, heads_per_group)) * share.transpose(2, 3)).flatten(3, 4)
    read = ScaledProduct.apply(grouped_q, scale, entering.M)  # [B, N, G, W*R, Dv]
    read = read.unflatten(3, (width, heads_per_group)).transpose(2, 3)  # [B, N, W, G, R, Dv]
    return torch.addcmul(read, local.unflatten(3, (num_groups, heads_per_group)), 1 - share).flatten(3, 4)
