"""The model's own backward passes against those of plain torch, and what they keep."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from infini_train.config import ModelConfig
from infini_train.model.feed_forward import SwiGLU
from infini_train.model.norm import RMSNorm
from infini_train.model.parameters import ParameterPlacement, initial_value, initialize_parameters
from infini_train.parallel.engine import add_gradient


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input for a fixed gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    towards = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards)]


def our_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(None, x.shape[-1], eps=1e-3)  # type: ignore[arg-type]  # the configuration is not read
    del norm._parameters["weight"]
    norm.weight = weight  # type: ignore[assignment]
    return norm(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_and_its_gradients_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 65, dtype=dtype), torch.rand(65, dtype=dtype) + 0.5
    x[0, 0] = 0
    wide = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (x, weight)]
    expected = gradients(lambda x, weight: functional.rms_norm(x, (65,), weight, eps=1e-3), *wide)
    for ours, theirs in zip(gradients(our_norm, x, weight), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_swiglu_and_its_gradient_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 130, dtype=dtype)
    expected = gradients(plain_swiglu, x.to(torch.promote_types(dtype, torch.float32)))
    for ours, theirs in zip(gradients(SwiGLU.apply, x), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("strided", [False, True])
def test_swiglu_takes_parts_of_larger_tensors(strided: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    x = x.transpose(0, 1) if strided else x[..., 2:]
    assert torch.autograd.gradcheck(SwiGLU.apply, x.detach().requires_grad_())


def test_their_backward_keeps_what_came_in_and_little_else() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x, weight = torch.randn(32, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        our_norm(x, weight)
        SwiGLU.apply(x)
    beside = [tensor for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(tensor.numel() for tensor in beside) == 32


def test_gradients_are_summed_to_the_bit_as_deepspeed_sums_them() -> None:
    torch.manual_seed(3)
    ours, theirs = (nn.Parameter(torch.zeros(7, 5, dtype=torch.bfloat16)) for _ in range(2))
    zero = SimpleNamespace(gradient_accumulation_dtype=torch.float32)
    for parameter in (ours, theirs):
        parameter.grad_accum = None  # type: ignore[attr-defined]
    for _ in range(4):
        gradient = torch.randn(7, 5).bfloat16()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        add_gradient(ours)
        DeepSpeedZeroOptimizer._fill_param_grad_accum_attribute(zero, theirs)
        assert ours.grad is None and theirs.grad is None
    assert ours.grad_accum.dtype == torch.float32  # type: ignore[attr-defined]
    torch.testing.assert_close(ours.grad_accum, theirs.grad_accum, rtol=0, atol=0)  # type: ignore[attr-defined]
    add_gradient(ours)  # no gradient this time, as where a parameter took no part
    torch.testing.assert_close(ours.grad_accum, theirs.grad_accum, rtol=0, atol=0)  # type: ignore[attr-defined]


def test_weights_drawn_by_several_threads_are_those_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    module = nn.ModuleDict({name: nn.Linear(5, 7 + number, bias=False) for number, name in enumerate("abcdefg")})
    placements = {
        name: ParameterPlacement(name, tuple(parameter.shape), None, 1, 0, 1) for name, parameter in module.named_parameters()
    }
    model = ModelConfig(num_layers=2)
    initialize_parameters(module, placements, model, seed=4)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), initial_value(placements[name], model, seed=4), rtol=0, atol=0)
