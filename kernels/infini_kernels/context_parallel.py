"""The memory over segments that are spread over the processes of a group, in contiguous runs and rank order.

Both rules are affine in M, M_out = T M_in + B over any run of segments, and so is z. Each process sums up its own run in
(T, B), the group exchanges the sums once, and each process folds those of the ranks before it into the memory that enters its
run. What crosses the wire are D x Dv states: their size does not depend on how many tokens a segment has. `hand_on` does the
same for a state that every run sets anew.

Shapes: P processes, B batch, G key/value heads, D key width, Dv value width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Transfer:
    """A collective that `_Start` begins and `_Wait` waits for; in the backward the other way round."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: Any = None


class RunExchange(_Transfer):
    """What each process's run of segments does to a state, state_out = factor state_in + added, sent to all of the group.

    The exchange starts when this is made and `fold` waits for it: what is computed in between overlaps with it. So does the
    backward of that, because the gradient's way back starts in the backward of `fold` and is waited for in that of the start.

    Args:
        factor: one number for each row and head, [B, G, 1] or [B, G, D, 1], or a matrix [B, G, D, D].
        added: [B, G, D] or [B, G, D, Dv].
        group: the processes, in the order of their runs.
    """

    def __init__(self, factor: Tensor, added: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.widths = factor.shape[-1], added.shape[-1]
        self.is_matrix = factor.dim() == 4 and factor.shape[-1] > 1
        self._maps: Tensor | None = _Start.apply(torch.cat((factor, added), dim=-1), self)  # [P, B, G, ..., factor and added]

    def fold(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state enters the first process's run -> what enters this process's run, and what leaves the last's."""
        maps = _Wait.apply(self._maps, self)
        self._maps = None  # its graph refers to this object: a circle that would keep both until a garbage collection
        entering = state
        for rank, map_of_run in enumerate(maps.unbind(0)):
            if rank == dist.get_rank(self.group):
                entering = state
            factor, added = map_of_run.split(self.widths, dim=-1)
            state = (factor @ state if self.is_matrix else factor * state) + added
        # What enters the first process's run depends on no other process. Its backward would then skip the collective that
        # the others wait in, unless the memory that leaves has a gradient too. The empty sum makes it depend on the exchange.
        return entering + maps[:0].sum(), state


def hand_on(entering: Tensor, leaving: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """A state that every run sets anew, whatever entered it.

    Args:
        entering: [...], enters the first process's run.
        leaving: [...], what this process's run leaves.
        group: the processes, in the order of their runs.

    Returns:
        What enters this process's run, and what leaves the last's.
    """
    transfer = _Transfer(group)
    left = _Wait.apply(_Start.apply(leaving, transfer), transfer)
    rank = dist.get_rank(group)
    # As in `RunExchange.fold`, the empty sum lets the first process take part in the backward's collective. The others do not
    # read what enters the first, and give it a gradient of zeros for what waits for one: ZeRO 3 lets go of a layer's weights
    # only when every input has its gradient, and where processes differ in that, they wait for each other for ever.
    taken = entering if rank == 0 else left[rank - 1] + entering.flatten()[:0].sum()
    return taken + left[:0].sum(), left[-1].clone()


class _Start(torch.autograd.Function):
    """[...] on each process -> [P, ...] on all, to be read after `_Wait`; the gradient of a process's part is the sum over all
    who used it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, exchange: _Transfer) -> Tensor:
        ctx.exchange = exchange
        gathered = local.new_empty(dist.get_world_size(exchange.group), *local.shape)
        exchange.work = dist.all_gather_into_tensor(
            gathered.flatten(0, 1), local.contiguous(), group=exchange.group, async_op=True
        )
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.work.wait()
        return gradients[0][dist.get_rank(ctx.exchange.group)], None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathered: Tensor, exchange: _Transfer) -> Tensor:
        ctx.exchange = exchange
        exchange.work.wait()
        # It holds views of what was gathered, whose graph refers to the exchange: a circle through C++ that no garbage
        # collection sees. A graph that is computed again and never walked backward, as under checkpointing, would stay.
        exchange.work = None
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Reduced in place while it is on its way to the backward of _Start, its only reader.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.exchange.work = dist.all_reduce(gradient, group=ctx.exchange.group, async_op=True)
        return gradient, None
