"""Segment-local attention compared with the oracle, and the use of FlashAttention."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from infini_kernels import local_attention, softmax_attention
from tests.unit.kernels.test_oracle import oracle


def inputs(tokens: int, heads: int, groups: int, key_width: int, value_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, key_width), (groups, key_width), (groups, value_width))
    return [torch.randn(2, tokens, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [None, (13, 6), ((5, 2, 3), (0, 4, 1))])
@pytest.mark.parametrize("heads, groups, key_width, value_width", [(4, 2, 4, 4), (6, 1, 4, 7), (2, 2, 6, 3)])
def test_outputs_and_gradients_agree_with_the_oracle(
    heads: int, groups: int, key_width: int, value_width: int, lengths: tuple[int, ...] | None
) -> None:
    tensors = inputs(13, heads, groups, key_width, value_width)
    angle = torch.arange(5)[:, None] / 3.0 ** torch.arange(key_width // 2)
    options = {
        "segment_length": 5,
        "rotary": (angle.cos().double(), angle.sin().double()),
        "lengths": None if lengths is None else torch.tensor(lengths),
    }
    gate = torch.full((heads,), -1e4, dtype=torch.float64)  # the memory has no weight
    wanted = oracle(*tensors, gate, **options)[0]
    out = local_attention(*tensors, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * direction).sum(), tensors) for x in (out, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_padding_may_contain_nan() -> None:
    clean = inputs(7, 2, 1, 4, 4)
    lengths = torch.tensor([[3, 2], [5, 0]])
    padding = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    dirty = [x.detach().clone().masked_fill(padding[:, :, None, None], torch.nan).requires_grad_() for x in clean]
    results = []
    for tensors in (clean, dirty):
        out = local_attention(*tensors, segment_length=5, lengths=lengths)
        assert not out[padding].any()
        results.append((out, torch.autograd.grad(out.sum(), tensors)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_output_keeps_the_half_type() -> None:
    tensors = [x.detach().bfloat16() for x in inputs(7, 2, 1, 4, 3)]
    assert local_attention(*tensors, segment_length=5).dtype == torch.bfloat16


@pytest.mark.parametrize("heads, groups, key_width, value_width", [(4, 4, 8, 8), (4, 2, 8, 5), (6, 1, 4, 7)])
def test_short_bfloat16_rows_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, key_width: int, value_width: int
) -> None:
    exact = [x.detach().bfloat16().double().requires_grad_() for x in inputs(13, heads, groups, key_width, value_width)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    direction = torch.randn(2, 13, heads, value_width, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = local_attention(*exact, segment_length=5)
    gradients = torch.autograd.grad((wanted * direction).sum(), exact)
    worst = {}
    for longest in (0, softmax_attention.SHORT_ROW_ON_CPU):
        monkeypatch.setattr(softmax_attention, "SHORT_ROW_ON_CPU", longest)
        out = local_attention(*half, segment_length=5)
        torch.testing.assert_close(out.double(), wanted, rtol=8e-3, atol=8e-3)
        found = torch.autograd.grad((out * direction).sum(), half)
        for x, y in zip(found, gradients, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=2e-2, atol=2e-2)
        worst[longest] = max((x - y).abs().max().item() for x, y in zip(found, gradients, strict=True))
    assert 0 < worst[softmax_attention.SHORT_ROW_ON_CPU] <= 1.5 * worst[0]


class FlashStandIn:
    """Replacement for flash-attn: implements its call with scaled_dot_product_attention."""

    calls = 0
    deterministic: bool | None = None

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, deterministic: bool
    ) -> Tensor:
        self.deterministic = deterministic
        assert causal and q.shape[-1] == k.shape[-1] == v.shape[-1]
        self.calls += 1
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=softmax_scale,
            enable_gqa=True,
        ).transpose(1, 2)


@pytest.mark.parametrize("key_width, value_width, deterministic", [(4, 4, False), (4, 7, True), (6, 3, False)])
def test_flash_attention_arguments(
    monkeypatch: pytest.MonkeyPatch, key_width: int, value_width: int, deterministic: bool
) -> None:
    tensors = inputs(13, 4, 2, key_width, value_width)
    wanted = local_attention(*tensors, segment_length=5)
    stand_in = FlashStandIn()
    monkeypatch.setattr(softmax_attention, "flash_attention_for", lambda q, v: stand_in)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    torch.testing.assert_close(local_attention(*tensors, segment_length=5), wanted, rtol=1e-12, atol=1e-12)
    assert stand_in.calls == 1 and stand_in.deterministic is deterministic


def test_flash_attention_is_not_used_on_the_cpu() -> None:
    half = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    assert softmax_attention.flash_attention_for(half, half) is None


def test_local_attention_choice_names_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    assert softmax_attention.local_attention_choice(half, half) == f"PyTorch {torch.__version__} on cpu"
    monkeypatch.setattr(
        softmax_attention, "flash_attention_for", lambda q, v: SimpleNamespace(__name__="flash_attn", __version__="2.8")
    )
    assert softmax_attention.local_attention_choice(half, half) == "flash_attn 2.8"


def test_flash_attention_4_is_not_mistaken_for_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 is in flash_attn/cute; flash_attn then has no `flash_attn_func`."""
    (tmp_path / "a_folder" / "cute").mkdir(parents=True)
    (tmp_path / "a_folder" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        softmax_attention.installed("a_folder.cute")
        and not softmax_attention.installed("a_folder")
        and not softmax_attention.installed("no_such_package")
    )


def test_newest_supported_flash_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 1, 128), device="cuda:0")
    modules = {name: SimpleNamespace(__name__=name) for name in ("flash_attn", "flash_attn_interface")}
    monkeypatch.setattr(softmax_attention, "_FAILURES", {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def taken(two: bool, three: bool, capability: int, **changes: object) -> str | None:
        monkeypatch.setattr(softmax_attention, "FLASH_ATTENTION_2", two)
        monkeypatch.setattr(softmax_attention, "FLASH_ATTENTION_3", three)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        found = softmax_attention.flash_attention_for(SimpleNamespace(**{**vars(q), **changes}), q)
        return None if found is None else found.__name__

    assert taken(True, True, 9) == "flash_attn_interface"
    assert taken(True, True, 8) == "flash_attn" and taken(True, False, 9) == "flash_attn"
    assert taken(False, True, 8) is None and taken(False, False, 9) is None
    assert taken(True, True, 9, dtype=torch.float32) is None and taken(True, True, 9, shape=(1, 1, 1, 512)) is None


def test_flash_attention_with_an_import_error_is_reported_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, its kernels were built for another PyTorch."""
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol:\\n_ZN3c104')")
    (tmp_path / "flash_attn.py").write_text("__version__ = '2.8'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(softmax_attention, "_FAILURES", {})
    candidates = ["flash_attn_interface", "flash_attn"]
    monkeypatch.setattr(softmax_attention, "_candidates", lambda q, v: candidates)
    half = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    try:
        assert softmax_attention.flash_attention_for(half, half).__name__ == "flash_attn"
    finally:
        sys.modules.pop("flash_attn", None)
    why = "(flash_attn_interface cannot be imported: undefined symbol: _ZN3c104)"
    assert softmax_attention.local_attention_choice(half, half) == f"flash_attn 2.8 {why}"
    candidates.pop()
    assert softmax_attention.flash_attention_for(half, half) is None
    assert softmax_attention.local_attention_choice(half, half) == f"PyTorch {torch.__version__} on cpu {why}"
