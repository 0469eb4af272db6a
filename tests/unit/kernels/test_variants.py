"""Variants that are not in the paper: learned write strength and corrected normaliser."""

import pytest
import torch

from infini_kernels import infini_attention

S, D = 4, 6


def stream(segments: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, segments * S, 1, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"q": q, "k": k, "v": torch.randn(1, segments * S, 1, 3, generator=generator, dtype=torch.float64)}


def run(x: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the memory read alone, [T, Dv], under the delta rule, and M."""
    only_memory = torch.full((1,), 50.0, dtype=torch.float64)
    out, memory = infini_attention(**x, gate=only_memory, segment_length=S, update_rule="delta", eps=1e-12, **options)
    return out[0, :, 0], memory.M


def test_write_gate_of_zero_equals_the_paper() -> None:
    x = stream(5)
    torch.testing.assert_close(run(x, write_gate=torch.zeros(1, D)), run(x), rtol=1e-12, atol=1e-12)


def test_tokens_with_zero_strength_are_not_written() -> None:
    """Keys opposite to the write gate: the memory of the stream equals that of the first segment."""
    x = stream(5)
    gate = torch.zeros(1, D)
    gate[0, 0] = 1
    x["k"][..., 0] = -500
    x["k"][:, :S, :, 0] = 500
    first = {name: value[:, :S] for name, value in x.items()}
    torch.testing.assert_close(run(x, write_gate=gate)[1], run(first, write_gate=gate)[1])


@pytest.mark.parametrize("times", [2, 9])
def test_repeated_writes_read_the_same_only_with_the_corrected_normaliser(times: int) -> None:
    one = stream(1)
    one["k"], one["v"] = (x[:, :1].expand(-1, S, -1, -1) for x in (one["k"], one["v"]))  # one key, one value
    x = {name: torch.cat([value] * (times + 1), dim=1) for name, value in one.items()}
    value = one["v"][0, 0, 0]
    torch.testing.assert_close(run(x, normaliser="corrected")[0][-1], value)
    assert (run(x)[0][-1] - value).norm() > 0.3 * value.norm()


def test_read_weights_sum_to_one_only_with_the_corrected_normaliser() -> None:
    x = stream(6)
    x["v"] = torch.full_like(x["v"], 3.0)
    torch.testing.assert_close(run(x, normaliser="corrected")[0][S:], x["v"][0, S:, 0])
    assert (run(x)[0][S:] - 3).abs().max() > 0.3
