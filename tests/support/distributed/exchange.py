"""Recorder of the context-parallel exchange: bytes sent, and the order of its starts and waits and of the local attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infini_kernels import context_parallel, reference


@dataclass
class Record:
    bytes: int = 0
    """Bytes that this process sends to the others."""
    events: list[str] = field(default_factory=list)


class _Work:
    def __init__(self, work: Any, name: str, record: Record) -> None:
        self._work, self._name, self._record = work, name, record

    def wait(self) -> None:
        self._record.events.append(f"{self._name} waited for")
        self._work.wait()


class _Marked(torch.autograd.Function):
    """Identity whose backward records an event."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, record: Record) -> Tensor:
        ctx.record = record
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.record.events.append("local attention backward")
        return gradients[0], None


@contextmanager
def recorded_exchange() -> Iterator[Record]:
    record = Record()
    dist = context_parallel.dist
    all_gather, all_reduce, attention = dist.all_gather_into_tensor, dist.all_reduce, reference.segment_attention

    def gather(gathered: Tensor, local: Tensor, **kwargs: Any) -> _Work:
        record.bytes += local.numel() * local.element_size() * (len(gathered) // len(local) - 1)
        record.events.append("gather started")
        return _Work(all_gather(gathered, local, **kwargs), "gather", record)

    def reduce(tensor: Tensor, **kwargs: Any) -> _Work:
        record.events.append("reduction started")
        return _Work(all_reduce(tensor, **kwargs), "reduction", record)

    def local_attention(*arguments: Any) -> Tensor:
        record.events.append("local attention")
        return _Marked.apply(attention(*arguments), record)

    dist.all_gather_into_tensor, dist.all_reduce, reference.segment_attention = gather, reduce, local_attention
    try:
        yield record
    finally:
        dist.all_gather_into_tensor, dist.all_reduce, reference.segment_attention = all_gather, all_reduce, attention
