"""The recurrence over segments compared with a loop that PyTorch differentiates."""

import pytest
import torch
from torch import Tensor

from infini_kernels.recurrence import walk


def loop(state: Tensor, added: Tensor, reset: Tensor | None, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    entering = []
    for s in range(added.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, s].view(-1, *[1] * (state.dim() - 1)), torch.zeros_like(state), state)
        entering.append(state)
        state = state + (added[:, s] if removed is None else added[:, s] - removed[:, s] @ state)
    return torch.stack(entering, dim=1), state


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("kind", ["z", "M", "delta"])
def test_equals_the_loop(kind: str, with_reset: bool, segments: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    tail = () if kind == "z" else (3,)
    state, added = draw(2, 2, 4, *tail), draw(2, segments, 2, 4, *tail)
    removed = draw(2, segments, 2, 4, 4) if kind == "delta" else None
    reset = torch.rand(2, segments, generator=generator) < 0.4 if with_reset else None
    tensors = [x for x in (state, added, removed) if x is not None]
    found, wanted = (run(state, added, reset, removed) for run in (walk, loop))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    directions = [draw(*x.shape).detach() for x in wanted]
    gradients = [
        torch.autograd.grad(sum((x * y).sum() for x, y in zip(out, directions, strict=True)), tensors)
        for out in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_reset_clears_values_that_are_not_finite() -> None:
    state, added = torch.full((2, 1, 3), torch.nan), torch.ones(2, 2, 1, 3)
    entering, leaving = walk(state, added, torch.tensor([[True, False], [False, True]]))
    assert torch.equal(entering[:, 1].isnan().all(dim=-1), torch.tensor([[False], [False]]))
    assert torch.equal(leaving, torch.tensor([2.0, 1.0]).view(2, 1, 1).expand(2, 1, 3))
