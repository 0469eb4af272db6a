"""Names for what takes time, seen by torch's profiler; without one they cost next to nothing."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

PREFIX = "part: "
P = ParamSpec("P")
R = TypeVar("R")


def part(name: str) -> AbstractContextManager:
    """What runs in this context, and its backward, is counted under this name; the innermost name counts."""
    # Asked first, because the name alone takes ten microseconds, with and without a profiler.
    return torch.profiler.record_function(PREFIX + name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()


def counted_as(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`part` for all of a function."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            with part(name):
                return function(*args, **kwargs)

        return counted

    return decorate
