"""Point-to-point transfers of hidden states and their gradients between neighbouring pipeline stages.

Hidden states and gradients use separate groups, and so do the transfers between the last stage and the first (virtual stages).
Within a group, all transfers then go in one direction along a chain without a cycle. Both ends of a link post them in the
schedule's order, so neither NCCL's per-communicator ordering nor gloo's matching can deadlock. Sends are asynchronous. Receives
are posted when their value is needed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from infini_train.parallel.layout import group_timeout


@dataclass(frozen=True)
class _Link:
    """A neighbouring stage, with the groups for hidden states and for gradients."""

    peer: int
    forward_group: Any
    backward_group: Any


class StageTransport:
    """Point-to-point links of one stage to the stages before and after each of its chunks.

    Args:
        hidden_shape: [T, B, hidden], the same for every micro-batch.
        dtype: dtype of hidden states.
        device: device of hidden states.
        virtual_stages: number of layer chunks per stage.
    """

    def __init__(
        self, hidden_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, virtual_stages: int = 1
    ) -> None:
        self.hidden_shape, self.dtype, self.device = hidden_shape, dtype, device
        self._pending: deque[tuple[Any, Tensor]] = deque()
        members = tuple(dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()))
        stage, last = members.index(dist.get_rank()), len(members) - 1
        previous = following = around = None
        if last > 0:
            groups = _group(members, "forward"), _group(members, "backward")
            previous = _Link(members[stage - 1], *groups) if stage > 0 else None
            following = _Link(members[stage + 1], *groups) if stage < last else None
        if last > 0 and virtual_stages > 1:
            ends = members[0], members[last]
            groups = _group(ends, "forward around"), _group(ends, "backward around")
            around = _Link(ends[0] if stage == last else ends[1], *groups)
        # Links by chunk: None before the first chunk of the first stage and after the last chunk of the last stage.
        self._before = [previous or (around if chunk > 0 else None) for chunk in range(virtual_stages)]
        self._after = [following or (around if chunk + 1 < virtual_stages else None) for chunk in range(virtual_stages)]

        _connect(members, stage, virtual_stages > 1, device)

    def receive_forward(self, chunk: int = 0) -> Tensor | None:
        """Receive hidden states [T, B, hidden] from the previous chunk; None for the model's first chunk."""
        link = self._before[chunk]
        return None if link is None else self._receive(link.peer, link.forward_group)

    def send_forward(self, hidden: Tensor, chunk: int = 0) -> None:
        """Send hidden states to the next chunk; do nothing for the model's last chunk."""
        link = self._after[chunk]
        if link is not None:
            self._send(hidden, link.peer, link.forward_group)

    def receive_backward(self, chunk: int = 0) -> Tensor | None:
        """Receive the gradient of this chunk's output; None for the model's last chunk."""
        link = self._after[chunk]
        return None if link is None else self._receive(link.peer, link.backward_group)

    def send_backward(self, gradient: Tensor, chunk: int = 0) -> None:
        """Send the gradient of this chunk's input; do nothing for the model's first chunk."""
        link = self._before[chunk]
        if link is not None:
            self._send(gradient, link.peer, link.backward_group)

    def wait_sends(self) -> None:
        """Wait until all sends have completed, so that their buffers may be freed."""
        while self._pending:
            work, _ = self._pending.popleft()
            work.wait()

    def _receive(self, peer: int, group: Any) -> Tensor:
        buffer = torch.empty(self.hidden_shape, dtype=self.dtype, device=self.device)
        work = dist.irecv(buffer, src=peer, group=group)
        assert work is not None
        work.wait()
        return buffer

    def _send(self, tensor: Tensor, peer: int, group: Any) -> None:
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()
        payload = tensor.detach().contiguous()
        # The buffer must outlive the transfer, so keep it with the handle.
        self._pending.append((dist.isend(payload, dst=peer, group=group), payload))


@cache
def _group(members: tuple[int, ...], purpose: Literal["forward", "backward", "forward around", "backward around"]) -> Any:
    """Return this pipeline's group for one purpose, and create it at the first call.

    torch.distributed requires all processes to create all groups together. A process that is not in `members` must therefore
    call this too, with the `members` of its own pipeline.
    """
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, members)
    chosen = None
    for ranks in sorted(set(pipelines)):
        group = dist.new_group(list(ranks), timeout=group_timeout())  # NCCL's default is ten minutes
        if ranks == members:
            chosen = group
    return chosen


@cache
def _connect(members: tuple[int, ...], stage: int, around: bool, device: torch.device) -> None:
    """Send one value over every link once, while no other transfer is in progress.

    NCCL creates a link's communicator at the link's first use, and the device may have to be idle for that. Within a schedule,
    one stage would do this while one of its own sends waits for the other stage to receive.
    """
    last = len(members) - 1
    if last == 0:
        return
    number = torch.zeros(1, device=device)

    def transfer(sender: int, receiver: int, group: Any) -> None:
        if stage == sender:
            dist.send(number, dst=members[receiver], group=group)
        elif stage == receiver:
            dist.recv(number, src=members[sender], group=group)

    forward, backward = _group(members, "forward"), _group(members, "backward")
    for before in range(last):
        transfer(before, before + 1, forward)
    for before in reversed(range(last)):
        transfer(before + 1, before, backward)
    if around:
        ends = members[0], members[last]
        transfer(last, 0, _group(ends, "forward around"))
        transfer(0, last, _group(ends, "backward around"))
    if device.type == "cuda":
        torch.cuda.synchronize()
