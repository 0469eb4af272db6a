"""Attention over whole documents against a dense mask in float64."""

import pytest
import torch
from torch import Tensor

from infini_kernels import document_attention, documents
from tests.unit.kernels.test_oracle import rotate, valid_by_segment

SEGMENT = 4


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, reset: Tensor | None, lengths: Tensor | None, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Compute the same attention with a T x T mask (same document, not later, not padding)."""
    batch_size, num_tokens, num_heads, width = q.shape
    q, k = (
        torch.stack(
            [
                torch.stack(
                    [
                        torch.stack([rotate(x[b, t, h], rotary[0][t], rotary[1][t]) for h in range(x.shape[2])])
                        for t in range(num_tokens)
                    ]
                )
                for b in range(batch_size)
            ]
        )
        for x in (q, k)
    )
    rows = []
    for b, valid in enumerate(valid_by_segment(lengths, batch_size, num_tokens, SEGMENT)):
        document, kept = [], []
        for s, count in enumerate(valid):
            begins = reset is not None and bool(reset[b, s])
            number = (document[-1] if document else 0) + begins
            present = min(SEGMENT, num_tokens - s * SEGMENT)
            document += [number] * present
            kept += [i < count for i in range(present)]
        numbers, keep = torch.tensor(document), torch.tensor(kept)
        allowed = (numbers[:, None] == numbers) & keep & torch.ones(num_tokens, num_tokens).tril().bool()
        heads = []
        for h in range(num_heads):
            g = h * k.shape[2] // num_heads
            scores = (q[b, :, h] @ k[b, :, g].T / width**0.5).masked_fill(~allowed, -1e300)
            heads.append((scores.softmax(-1) @ v[b, :, g]) * keep[:, None])
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)


def inputs(tokens: int, value_width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((4, 4), (2, 4), (2, value_width))
    return [torch.randn(2, tokens, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def rotary_for(tokens: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] / 3.0 ** torch.arange(2)
    return angle.cos().double(), angle.sin().double()


CASES = {
    "no reset": (13, None, None),
    "one token": (1, None, None),
    "resets": (13, ((0, 1, 0, 0), (1, 0, 0, 1)), None),
    "row lengths": (13, None, (13, 6)),
    "one row empty": (13, ((0, 1, 0, 0), (1, 0, 0, 1)), (0, 11)),
    "segment lengths": (13, None, ((4, 2, 4, 1), (0, 3, 1, 0))),
    "segment lengths and resets": (15, ((0, 0, 1, 0), (0, 1, 0, 1)), ((4, 2, 4, 3), (2, 4, 0, 3))),
}


@pytest.mark.parametrize("value_width", [4, 3])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree_with_a_dense_mask(name: str, value_width: int) -> None:
    tokens, reset, lengths = CASES[name]
    tensors = inputs(tokens, value_width)
    options = {
        "reset": None if reset is None else torch.tensor(reset, dtype=torch.bool),
        "lengths": None if lengths is None else torch.tensor(lengths),
        "rotary": rotary_for(tokens),
    }
    wanted = dense(*tensors, **options)
    out = document_attention(*tensors, segment_length=SEGMENT, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * direction).sum(), tensors) for x in (out, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_attention_does_not_cross_documents() -> None:
    reset = torch.tensor([[0, 0, 1, 0]] * 2, dtype=torch.bool)
    tensors = [x.detach() for x in inputs(13)]
    before = document_attention(*tensors, segment_length=SEGMENT, reset=reset)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, :8] += 3
    after = document_attention(*changed, segment_length=SEGMENT, reset=reset)
    torch.testing.assert_close(after[:, 8:], before[:, 8:], rtol=0, atol=1e-12)
    assert (after[:, :8] - before[:, :8]).abs().max() > 1


def test_padding_may_contain_nan_and_a_call_of_only_padding_stays_in_the_graph() -> None:
    for lengths in ((5, 0), (0, 0)):
        tensors = inputs(7)
        padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
        dirty = [x.detach().masked_fill(padding[:, :, None, None], torch.nan).requires_grad_() for x in tensors]
        results = []
        for each in (tensors, dirty):
            out = document_attention(*each, segment_length=SEGMENT, reset=None, lengths=torch.tensor(lengths))
            assert not out[padding].any()
            results.append((out, torch.autograd.grad(out.sum(), each)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


class FlashStandIn:
    """Replacement for flash-attn: implements its packed call span by span."""

    calls = 0

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
    ) -> Tensor:
        assert deterministic is torch.are_deterministic_algorithms_enabled()
        assert causal and cu_seqlens_q.dtype == torch.int32 and q.shape[-1] == v.shape[-1]
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(cu_seqlens_q[-1]) == q.shape[0]
        spans = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(spans)
        self.calls += 1
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in piece), is_causal=True, scale=softmax_scale, enable_gqa=True
                ).transpose(0, 1)
                for piece in zip(*(x.split(spans) for x in (q, k, v)), strict=True)
            ]
        )


@pytest.mark.parametrize("value_width", [4, 3])
def test_flash_attention_gets_the_spans_of_all_rows_in_one_call(monkeypatch: pytest.MonkeyPatch, value_width: int) -> None:
    tokens, reset, lengths = CASES["segment lengths and resets"]
    tensors = inputs(tokens, value_width)
    options = {
        "segment_length": SEGMENT,
        "reset": torch.tensor(reset, dtype=torch.bool),
        "lengths": torch.tensor(lengths),
    }
    wanted = document_attention(*tensors, **options)
    stand_in = FlashStandIn()
    monkeypatch.setattr(documents, "flash_attention_for", lambda q, v: stand_in)
    torch.testing.assert_close(document_attention(*tensors, **options), wanted, rtol=1e-12, atol=1e-12)
    assert stand_in.calls == 1
