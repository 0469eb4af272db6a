"""Peak memory use is linear in the number of tokens, not quadratic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infini_kernels import document_attention, infini_attention, local_attention

S, H, G, D, DV = 16, 4, 2, 8, 6


class LargestTensor(TorchDispatchMode):
    """Dispatch mode that records the largest result of all operations, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes += [x.shape for x in tree_leaves(result) if isinstance(x, Tensor)]
        return result

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.shapes)


def linear_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return infini_attention(q, k, v, torch.zeros(H), segment_length=S)[0]


def delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return infini_attention(q, k, v, torch.zeros(H), segment_length=S, update_rule="delta")[0]


def local_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return local_attention(q, k, v, segment_length=S)


def one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return document_attention(q, k, v, segment_length=S, reset=None)


def two_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_segments = q.shape[1] // S
    reset = torch.zeros(1, num_segments, dtype=torch.bool)
    reset[0, num_segments // 4] = True
    lengths = torch.full((1, num_segments), S)
    lengths[0, num_segments // 2] = 3
    return document_attention(q, k, v, segment_length=S, reset=reset, lengths=lengths)


def run(operation: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int) -> LargestTensor:
    tensors = [torch.randn(1, tokens, *shape, requires_grad=True) for shape in ((H, D), (G, D), (G, DV))]
    with LargestTensor() as seen:
        operation(*tensors).sum().backward()
    return seen


@pytest.mark.parametrize("operation", [linear_rule, delta_rule, local_only, one_document, two_documents])
def test_largest_tensor_is_linear_in_the_tokens(
    operation: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    tokens = 512
    short, long = run(operation, tokens), run(operation, 2 * tokens)
    assert long.largest <= 2 * short.largest
    for seen, length in ((short, tokens), (long, 2 * tokens)):
        assert not [shape for shape in seen.shapes if sum(size >= length // 2 for size in shape) > 1]


def test_largest_tensor_detects_a_matrix_of_scores() -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[0, :, 0] @ k[0, :, 0].T).softmax(-1) @ v[0, :, 0]

    assert run(dense, 256).largest == 256 * 256
