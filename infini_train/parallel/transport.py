"""Moves hidden states and their gradients between neighbouring pipeline stages.

Hidden states and gradients travel over two groups of their own. Each direction is then a chain without a cycle, in which both
ends of a link post their transfers in the schedule's order, so neither NCCL's per-communicator ordering nor gloo's matching
can deadlock; sends are asynchronous and receives are posted when their value is needed.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class StageTransport:
    """Point-to-point links of one stage to the stage before and the stage after.

    Args:
        hidden_shape: [T, B, hidden], the same for every micro-batch.
        dtype: type of hidden states.
        device: where they live.
    """

    def __init__(self, hidden_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.hidden_shape, self.dtype, self.device = hidden_shape, dtype, device
        self._pending: deque[tuple[Any, Tensor]] = deque()
        members = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        stage = members.index(dist.get_rank())
        self._previous = members[stage - 1] if stage > 0 else None
        self._next = members[stage + 1] if stage + 1 < len(members) else None
        self._forward_group, self._backward_group = _direction_groups(tuple(members))

    def receive_forward(self) -> Tensor | None:
        """Hidden states [T, B, hidden] from the stage before; None on the first stage."""
        return self._receive(self._previous, self._forward_group)

    def send_forward(self, hidden: Tensor) -> None:
        """Hidden states to the stage after; nothing on the last stage."""
        self._send(hidden, self._next, self._forward_group)

    def receive_backward(self) -> Tensor | None:
        """Gradient of the hidden states that left; None on the last stage."""
        return self._receive(self._next, self._backward_group)

    def send_backward(self, gradient: Tensor) -> None:
        """Gradient of the hidden states that entered; nothing on the first stage."""
        self._send(gradient, self._previous, self._backward_group)

    def wait_sends(self) -> None:
        """Return when everything sent has left, so that buffers may be freed."""
        while self._pending:
            work, _ = self._pending.popleft()
            work.wait()

    def _receive(self, peer: int | None, group: Any) -> Tensor | None:
        if peer is None:
            return None
        buffer = torch.empty(self.hidden_shape, dtype=self.dtype, device=self.device)
        work = dist.irecv(buffer, src=peer, group=group)
        assert work is not None
        work.wait()
        return buffer

    def _send(self, tensor: Tensor, peer: int | None, group: Any) -> None:
        if peer is None:
            return
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()
        payload = tensor.detach().contiguous()
        # The buffer must outlive the transfer, so it is kept beside its handle.
        self._pending.append((dist.isend(payload, dst=peer, group=group), payload))


@cache
def _direction_groups(pipeline: tuple[int, ...]) -> tuple[Any, Any]:
    """This pipeline's two groups, made once. Every process makes every pipeline's groups, as torch.distributed requires."""
    if len(pipeline) == 1:
        return None, None
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, pipeline)
    chosen: tuple[Any, Any] = (None, None)
    for ranks in sorted(set(pipelines)):
        groups = dist.new_group(list(ranks)), dist.new_group(list(ranks))
        if ranks == pipeline:
            chosen = groups
    return chosen
