"""Recording of tensors and messages while the training code runs. Tests and dry runs compare the records with the plan."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Message:
    """One call of a collective or a point-to-point operation by this process."""

    operation: str
    """all_reduce, all_gather, reduce_scatter, reduce, broadcast, send or receive."""
    ranks: tuple[int, ...]
    """Global ranks of the process group."""
    bytes: int
    """Bytes of the largest tensor of the call: the full tensor for reductions, the output for a gather."""


_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}


class Observer(TorchDispatchMode):
    """Dispatch mode that records messages and counts the bytes of live tensors while it is active.

    Args:
        existing: tensors that exist before the mode is entered and are counted too.

    Attributes:
        messages: every message, in order.
        live: bytes of storages that are not freed.
        peak: maximum of `live` so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in existing:
            self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func, args)
            return func(*args, **(kwargs or {}))
        result = self.compute(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        return result

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation. Subclasses override this to replace results."""
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any) -> None:
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
        if name == "allgather_":  # a list with one tensor per process
            size = sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(args[0]))
        operation = _OPERATIONS.get(name, name)
        self.messages.append(Message(operation, tuple(dist.get_process_group_ranks(group)), size))

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_group(argument: Any) -> bool:
    return "ProcessGroup" in str(argument._type())


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the tensors' storages. A storage that several tensors share counts once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
