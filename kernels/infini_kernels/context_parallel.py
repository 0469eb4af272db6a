"""Memory over segments that are spread over the processes of a group, in contiguous runs and rank order.

Both rules are affine in M, M_out = T M_in + B over any run of segments, and so is z. Each process reduces its own run to
(T, B). The group exchanges these once. Each process then folds those of the lower ranks into the memory that enters its
run. The messages are D x Dv states, whose size does not depend on the number of tokens. `pass_to_next_rank` does the same
for a state that each run replaces.

Shapes: P processes, B batch, G key/value heads, D key width, Dv value width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Transfer:
    """Collective that `_Start` begins and `_Wait` completes; in the backward pass `_Wait` begins it and `_Start` completes
    it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: Any = None


class RunExchange(_Transfer):
    """All-gather of the affine map of each process's run of segments, state_out = factor state_in + added.

    The exchange starts in the constructor, and `fold` waits for it. Computation in between overlaps with it. The backward
    of that computation overlaps too: the exchange of gradients starts in the backward of `fold` and completes in the
    backward of the start.

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
        """Apply the maps of all runs in order.

        Args:
            state: state that enters the first process's run.

        Returns:
            The state that enters this process's run, and the state after the last process's run.
        """
        maps = _Wait.apply(self._maps, self)
        self._maps = None  # its graph refers to this object: a cycle that would live until garbage collection
        entering = state
        for rank, map_of_run in enumerate(maps.unbind(0)):
            if rank == dist.get_rank(self.group):
                entering = state
            factor, added = map_of_run.split(self.widths, dim=-1)
            state = (factor @ state if self.is_matrix else factor * state) + added
        # The state that enters the first process's run does not depend on other processes. Its backward would then skip the
        # collective in which the others wait, unless the final memory has a gradient too. The empty sum adds the dependency.
        return entering + maps[:0].sum(), state


def pass_to_next_rank(entering: Tensor, leaving: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Pass a state that each run replaces to the next rank.

    Args:
        entering: [...], enters the first process's run.
        leaving: [...], state after this process's run.
        group: the processes, in the order of their runs.

    Returns:
        The state that enters this process's run, and the state after the last process's run.
    """
    transfer = _Transfer(group)
    left = _Wait.apply(_Start.apply(leaving, transfer), transfer)
    rank = dist.get_rank(group)
    # As in `RunExchange.fold`, the empty sum makes the first process take part in the collective of the backward. The other
    # processes do not use `entering`, but give it a gradient of zeros: ZeRO 3 releases a layer's weights only when every input
    # has its gradient, and if the processes differ in that, they deadlock.
    taken = entering if rank == 0 else left[rank - 1] + entering.flatten()[:0].sum()
    return taken + left[:0].sum(), left[-1].clone()


class _Start(torch.autograd.Function):
    """All-gather [...] -> [P, ...] that may be read after `_Wait`.

    The gradient of one process's slice is the sum over all processes that used it.
    """

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
        # The work handle holds views of the gathered tensor, whose graph refers to the exchange: a cycle through C++ that
        # garbage collection does not see. A graph that is recomputed without a backward, as in checkpointing, would leak.
        exchange.work = None
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Reduced in place until the backward of _Start, its only reader, waits for it.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.exchange.work = dist.all_reduce(gradient, group=ctx.exchange.group, async_op=True)
        return gradient, None
