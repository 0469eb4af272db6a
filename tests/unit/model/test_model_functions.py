"""The model's custom backward passes against plain torch, and the tensors that they save."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from infini_train.config import ModelConfig
from infini_train.model.feed_forward import SwiGLU
from infini_train.model.norm import RMSNorm
from infini_train.model.parameter_placement import ParameterPlacement, initial_value, initialize_parameters
from infini_train.model.self_attention import SplitHeads
from infini_train.parallel.deepspeed.gradient_sums import sum_gradients_without_copies


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the output, and the gradient of each input for a fixed gradient of the output."""
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
def test_norm_and_its_gradients_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 65, dtype=dtype), torch.rand(65, dtype=dtype) + 0.5
    x[0, 0] = 0
    wide = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (x, weight)]
    expected = gradients(lambda x, weight: functional.rms_norm(x, (65,), weight, eps=1e-3), *wide)
    for ours, theirs in zip(gradients(our_norm, x, weight), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_swiglu_and_its_gradient_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 130, dtype=dtype)
    expected = gradients(plain_swiglu, x.to(torch.promote_types(dtype, torch.float32)))
    for ours, theirs in zip(gradients(SwiGLU.apply, x), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("strided", [False, True])
def test_swiglu_accepts_views_of_larger_tensors(strided: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    x = x.transpose(0, 1) if strided else x[..., 2:]
    assert torch.autograd.gradcheck(SwiGLU.apply, x.detach().requires_grad_())


def test_backward_saves_the_input_and_little_else() -> None:
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


def bfloat16_optimizer(parameter: nn.Parameter) -> BF16_Optimizer:
    """Return DeepSpeed's stage 1 optimizer with only the fields that gradient sums need."""
    zero = BF16_Optimizer.__new__(BF16_Optimizer)
    zero.autoep_folding_tp_group = None
    zero.fp32_groups_gradients = [[torch.zeros(parameter.numel())]]
    zero.fp32_groups_has_gradients = [[False]]
    return zero


def test_gradient_sums_equal_deepspeed_bitwise() -> None:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(7, 5, dtype=torch.bfloat16)) for _ in range(2)]
    ours, theirs = (bfloat16_optimizer(parameter) for parameter in parameters)
    sum_gradients_without_copies(ours)
    for number in range(4):
        gradient = torch.randn(7, 5).bfloat16()
        for zero, parameter in zip((ours, theirs), parameters, strict=True):
            parameter.grad = gradient.clone()
            zero._update_hp_grad(parameter, 0, 0, clear_lp_grads=number == 3)
            assert zero.fp32_groups_has_gradients == [[True]] and parameter._hp_grad is zero.fp32_groups_gradients[0][0]
            assert not parameter.grad.any() if number == 3 else torch.equal(parameter.grad, gradient)
    parameters[0].grad = None  # as for a parameter that the micro-batch did not use
    ours._update_hp_grad(parameters[0], 0, 0, clear_lp_grads=False)
    assert theirs.fp32_groups_gradients[0][0].any()
    torch.testing.assert_close(ours.fp32_groups_gradients, theirs.fp32_groups_gradients, rtol=0, atol=0)


def test_gradient_sums_of_an_offloaded_optimizer_equal_deepspeed_bitwise() -> None:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(7, 5, dtype=torch.bfloat16)) for _ in range(2)]
    zeros = [DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer) for _ in parameters]
    for zero, parameter in zip(zeros, parameters, strict=True):
        zero.use_grad_accum_attribute, zero.gradient_accumulation_dtype = True, torch.float32
        parameter.grad_accum = None  # type: ignore[attr-defined]
    sum_gradients_without_copies(zeros[0])
    for _ in range(4):
        gradient = torch.randn(7, 5).bfloat16()
        for zero, parameter in zip(zeros, parameters, strict=True):
            parameter.grad = gradient.clone()
            zero._fill_param_grad_accum_attribute(parameter)
            assert parameter.grad is None
    zeros[0]._fill_param_grad_accum_attribute(parameters[0])  # this call has no gradient
    sums = [parameter.grad_accum for parameter in parameters]  # type: ignore[attr-defined]
    assert sums[0].dtype == torch.float32 and sums[1].any()
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=0)


def test_other_optimizers_are_not_changed() -> None:
    other = SimpleNamespace()
    sum_gradients_without_copies(other)
    assert not vars(other)


def test_weights_drawn_by_several_threads_depend_on_their_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    module = nn.ModuleDict({name: nn.Linear(5, 7 + number, bias=False) for number, name in enumerate("abcdefg")})
    placements = {
        name: ParameterPlacement(name, tuple(parameter.shape), None, 1, 0, 1) for name, parameter in module.named_parameters()
    }
    model = ModelConfig(num_layers=2)
    initialize_parameters(module, placements, model, seed=4)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), initial_value(placements[name], model, seed=4), rtol=0, atol=0)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
def test_heads_are_split_as_in_megatron(heads: int, groups: int) -> None:
    """Each group holds its query heads, then one key head and one value head."""
    T, B, D, share = 5, 2, 4, heads // groups
    mixed = torch.randn(T, B, (heads + 2 * groups) * D, generator=torch.Generator().manual_seed(0))

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.view(T, B, groups, -1).split([share * D, D, D], dim=3)
        return q.reshape(T, B, heads, D), k, v

    results = []
    for split in (plain, lambda x: SplitHeads.apply(x, groups, D)):
        leaf = mixed.clone().requires_grad_()
        outputs = split(leaf)
        generator = torch.Generator().manual_seed(1)
        towards = [torch.randn(x.shape, generator=generator) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, towards)])
        results[-1] += torch.autograd.grad(split(leaf)[1].sum(), leaf)  # gradient through the keys only
    torch.testing.assert_close(*results, rtol=0, atol=0)
