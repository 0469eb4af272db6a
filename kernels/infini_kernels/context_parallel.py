"""The memory over segments that are spread over the processes of a group, in contiguous runs and rank order.

Both rules are affine in M, M_out = T M_in + B over any run of segments, and so is z. Each process sums up its own run in
(T, B), the group exchanges the sums once, and each process folds those of the ranks before it into the memory that enters its
run. What crosses the wire are D x Dv states: their size does not depend on how many tokens a segment has.

Shapes: P processes, B batch, G key/value heads, D key width, Dv value width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """[...] on each process -> [P, ...] on all; the gradient of a process's part is the sum over all who used it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(dist.get_world_size(group), *local.shape)
        dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def _used(entering: Tensor, maps: Tensor) -> Tensor:
    """The same value, but depending on the exchange.

    What enters the first process's run depends on no other process. Its backward would then skip the collective that the
    others wait in, unless the memory that leaves has a gradient too.
    """
    return entering + maps[:0].sum()


def exchange_normaliser(run_z: Tensor, kept: Tensor, memory_z: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """z at the start of this process's run, and after the whole group's.

    run_z [B, G, D]: what the run makes of an empty z; kept [B]: 1 if no reset is in the run, else 0; memory_z [B, G, D]: what
    enters the first process's run.
    """
    factor = kept[:, None, None].expand_as(run_z)
    maps = _AllGather.apply(torch.stack((factor, run_z)), group)  # [P, 2, B, G, D]
    entering = state = memory_z
    for rank, (keep, added) in enumerate(maps.unbind(0)):
        if rank == dist.get_rank(group):
            entering = state
        state = keep * state + added
    return _used(entering, maps), state


def exchange_memory(
    run_M: Tensor, transition: Tensor | None, kept: Tensor, memory_M: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """M at the start of this process's run, and after the whole group's.

    run_M [B, G, D, Dv]: what the run makes of an empty memory; transition [B, G, D, D]: T, what it does to one that enters
    (delta rule), None where it keeps or drops it (linear rule); kept [B] as above; memory_M [B, G, D, Dv].
    """
    factor = kept[:, None, None, None].expand(*run_M.shape[:-1], 1) if transition is None else transition
    maps = _AllGather.apply(torch.cat((factor, run_M), dim=-1), group)  # [P, B, G, D, 1 + Dv] or [P, B, G, D, D + Dv]
    entering = state = memory_M
    for rank, map_of_run in enumerate(maps.unbind(0)):
        if rank == dist.get_rank(group):
            entering = state
        keep, added = map_of_run.split((factor.shape[-1], run_M.shape[-1]), dim=-1)
        state = (keep * state if transition is None else keep @ state) + added
    return _used(entering, maps), state
