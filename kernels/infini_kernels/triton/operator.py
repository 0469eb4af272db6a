"""Custom operators that are called directly when no compiler needs them.

torch.compile and fake tensors need an operator with a schema, a fake implementation and an autograd formula. Each call of
such an operator costs the host tens of microseconds more than a plain `torch.autograd.Function`, and a layer makes a dozen
calls per training step (benchmarks/host.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Operator(Generic[R]):
    """Custom operator in the namespace infini_kernels that mutates nothing.

    Args:
        implementation: the function, with a schema that `torch.library.custom_op` can infer. Called with positional
            arguments only.
    """

    def __init__(self, implementation: Callable[..., R]) -> None:
        functools.update_wrapper(self, implementation)
        self._implementation = implementation
        self._defaults = tuple(each.default for each in inspect.signature(implementation).parameters.values())
        self._function: type[torch.autograd.Function] | None = None
        self.custom = torch.library.custom_op(f"infini_kernels::{implementation.__name__}", implementation, mutates_args=())

    def register_fake(self, fake: Callable[..., R]) -> None:
        """Register a fake implementation; see `torch.library.CustomOpDef.register_fake`."""
        self.custom.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Register a backward; see `torch.library.CustomOpDef.register_autograd`."""
        self.custom.register_autograd(backward, setup_context=setup_context)

        # Not the form with a separate `setup_context`, because torch binds its arguments by inspection at every call.
        def forward(ctx: Any, *args: Any) -> R:
            output = self._implementation(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._implementation.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> R:
        if torch.compiler.is_compiling() or not _is_plain_call(args):
            return self.custom(*args)
        if not (torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in args)):
            return self._implementation(*args)
        if self._function is None:  # a backward of a backward: torch reports the error
            return self.custom(*args)
        return self._function.apply(*args, *self._defaults[len(args) :])


def _is_plain_call(args: tuple[Any, ...]) -> bool:
    """Return whether nothing intercepts operations: no dispatch mode, no functorch transform, no tensor subclass."""
    return (
        _direct[-1]
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in args if isinstance(each, Tensor))
    )


_direct = [True]


@contextmanager
def as_custom_operators() -> Iterator[None]:
    """Return a context in which every call uses the custom operator, as under a compiler."""
    _direct.append(False)
    try:
        yield
    finally:
        _direct.pop()
