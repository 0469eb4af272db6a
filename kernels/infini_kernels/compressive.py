"""Compressive memory: write, read, and recurrence over segments (arXiv 2404.07143, Eq. 3, 4, 8, 9 and 10).

All of it computes in the type of the memory, float32 (float64 for verification), independent of the type of the model.

Shapes: B batch, N segments, W tokens of a segment in this call, H query heads, G key/value heads, R = H/G, D key width, Dv
value width.
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
    """Return a context that turns off autocast for x's device type.

    Autocast would run the matrix products of the memory in a half-precision type.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def sigma(x: Tensor, dtype: torch.dtype, feature_map: str = "elu") -> Tensor:
    """Return σ(x) over the last dimension, in the type of the memory.

    σ is the paper's ELU(x) + 1, or `variants.sharp_features`.
    """
    x = x.to(dtype)
    return FeatureMap.apply(x) if feature_map == "elu" else sharp_features(x)


class CarriedMemory(NamedTuple):
    """Memory along N segments: the states that enter the segments, and the state after the last.

    entering is None if there is only one segment and its memory is empty.
    """

    entering: MemoryState | None  # M [B, N, G, D, Dv], z [B, N, G, D]
    leaving: MemoryState  # M [B, G, D, Dv], z [B, G, D]


class SegmentUpdates(Protocol):
    """Effect of each segment on the memory, computed once for all segments from keys and values.

    Attributes:
        written: σ(K)^T V, [B, N, G, D, Dv].
        z: Σ σ(K), [B, N, G, D].
    """

    written: Tensor
    z: Tensor

    def select(self, places: Tensor | None) -> Removals:
        """Return the removals of the segments b N + n listed in places [X], in that order.

        None selects all segments.
        """
        ...

    def walk(self, state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run `recurrence.walk`."""
        ...

    def walk_both(self, memory: MemoryState, added: MemoryState, reset: Tensor | None) -> tuple[MemoryState, MemoryState]:
        """Run `walk` on M and z without removals.

        Returns:
            The memory that enters each segment, and the memory after the last.
        """
        ...


class PlainUpdates:
    """`SegmentUpdates` in PyTorch operations.

    With a strength s of each write, σ(K)^T diag(s) replaces every σ(K)^T that writes.

    Args:
        sigma_k: σ(K) [B, N, W, G, D], zero at padding.
        v: [B, N, W, G, Dv].
        strength: [B, N, W, G, 1]; None for 1.
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
    """Recurrence of the memory over segments.

    Both rules are M_s = T_s M_{s-1} + B_s once z is known (Eq. 8 and 9):

        linear  B_s = σ(K)^T V, T_s = I
        delta   B_s = σ(K)^T V, T_s = I - σ(K)^T diag(1 / (σ(K) z_{s-1} + ε)) σ(K)

    B_s and T_s are computed from the keys for all segments at once; only the recurrence of D x Dv states is sequential.
    With a group, the exchange between its processes runs from the constructor to `carry`, so that other work can overlap
    with it.

    Args:
        updates: effect of each segment on the memory.
        memory: memory that enters the first segment; None for zeros.
        reset: [B, N] bool: the memory is zeroed before that segment.
        update_rule: 'linear' or 'delta'.
        eps: ε.
        group: processes over which the segments are spread; None if all segments are on this process.
        repeats: [B, N], how often each segment's update counts; None for once.
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
            kept = _rows_without_reset(reset, self._written)[:, None, None].expand(-1, num_groups, 1)
            _, run_z = self._walk(torch.zeros_like(memory.z), self._written_z, reset)
            self._exchange_z = RunExchange(kept, run_z, group)
        self._carried_z: tuple[Tensor, Tensor] | None = None
        self._removed = None
        if update_rule == "delta":  # M needs z, so wait for the exchange of z
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
        """Return z that enters each segment [B, N, G, D], and z after the last."""
        if self._group is None:
            return self._walk(self._memory.z, self._written_z, self._reset)
        first, leaving = self._exchange_z.fold(self._memory.z)
        return self._walk(first, self._written_z, self._reset)[0], leaving

    def carry(self) -> CarriedMemory:
        """Wait for the exchange and run the recurrence over the segments."""
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
        """Return the product of T over all segments under the delta rule, [B, G, D, D].

        It maps the memory that enters the first segment to its share of the memory after the last.
        """
        identity = torch.eye(removed.shape[-1], dtype=removed.dtype, device=removed.device).expand_as(removed[:, 0])
        return self._walk(identity, torch.zeros_like(removed), self._reset, removed)[1]


def _rows_without_reset(reset: Tensor | None, like: Tensor) -> Tensor:
    """Return 1 for rows in which no segment resets and 0 for others: [B], in the type of the memory."""
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
    """Read the memory and mix it with local attention (Eq. 3 and 10).

    A = sigmoid(β) σ(Q) M_{s-1} / (σ(Q) z_{s-1} + ε) + (1 - sigmoid(β)) A_dot

    Args:
        sigma_q: σ(Q) [B, N, W, H, D].
        local: A_dot [B, N, W, H, Dv].
        gate: β [H].
        entering: M [B, N, G, D, Dv] and z [B, N, G, D]; None for an empty memory.
        first_segment: 'paper', or 'local_only' to leave A_dot unscaled in heads with an empty memory (z = 0).
        eps: ε.

    Returns:
        A [B, N, W, H, Dv], in the type of the memory.
    """
    num_heads = gate.shape[0]
    share = gate.to(sigma_q.dtype).sigmoid()  # [H]
    if entering is None:
        if first_segment == "local_only":
            share = share * 0  # not a constant: the gate stays in the graph with gradient zero
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
    # Multiply the share into the scale (one number per token and head), which saves a pass over the values.
    scale = (scale.unflatten(3, (width, heads_per_group)) * share.transpose(2, 3)).flatten(3, 4)
    read = ScaledProduct.apply(grouped_q, scale, entering.M)  # [B, N, G, W*R, Dv]
    read = read.unflatten(3, (width, heads_per_group)).transpose(2, 3)  # [B, N, W, G, R, Dv]
    return torch.addcmul(read, local.unflatten(3, (num_groups, heads_per_group)), 1 - share).flatten(3, 4)
