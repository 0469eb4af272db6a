"""Plain oracle of Infini-attention, and its comparison with hand calculations.

The oracle evaluates arXiv 2404.07143, Eq. 3 to 10, with loops over row, head, segment and token, and shares no code with
the kernels. Given float64 it is exact to rounding, and autograd differentiates it.
"""

import pytest
import torch
from torch import Tensor

from infini_kernels import infini_attention


def sigma(x: Tensor, feature_map: str = "elu") -> Tensor:
    if feature_map == "softmax":
        return (2 * x).exp() / (2 * x).exp().sum()
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate one head [D] at one position (cos, sin [D/2]), as a complex number per pair of halves."""
    half = x.shape[0] // 2
    turned = torch.complex(x[:half], x[half:]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag))


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = torch.stack([query @ key / query.shape[0] ** 0.5 for key in keys])
    return torch.softmax(scores, dim=0) @ torch.stack(values)


def valid_by_segment(lengths: Tensor | None, batch_size: int, num_tokens: int, segment_length: int) -> list[list[int]]:
    """Return the number of valid tokens of every segment of every row."""
    starts = range(0, num_tokens, segment_length)
    present = [min(segment_length, num_tokens - start) for start in starts]
    if lengths is None:
        return [present] * batch_size
    if lengths.dim() == 2:
        return [[int(n) for n in row] for row in lengths]
    return [[max(0, min(n, int(row) - s)) for s, n in zip(starts, present, strict=True)] for row in lengths]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    M: Tensor | None = None,
    z: Tensor | None = None,
    *,
    segment_length: int,
    update_rule: str = "linear",
    rotary: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    first_segment: str = "paper",
    eps: float = 1e-6,
    write_gate: Tensor | None = None,
    normaliser: str = "paper",
    feature_map: str = "elu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (out, M, z) for the arguments of `infini_attention`, token by token."""
    batch_size, num_tokens, num_heads, key_width = q.shape
    num_groups, value_width = v.shape[2:]
    corrected = normaliser == "corrected"
    valid = valid_by_segment(lengths, batch_size, num_tokens, segment_length)
    out = {}
    states = {}
    for b in range(batch_size):
        for g in range(num_groups):
            M_s = q.new_zeros(key_width, value_width + corrected) if M is None else M[b, g]
            z_s = q.new_zeros(key_width) if z is None else z[b, g]
            for s, num_valid in enumerate(valid[b]):
                if reset is not None and reset[b, s]:
                    M_s, z_s = torch.zeros_like(M_s), torch.zeros_like(z_s)
                tokens = range(s * segment_length, s * segment_length + num_valid)
                for h in range(g * num_heads // num_groups, (g + 1) * num_heads // num_groups):
                    keys: list[Tensor] = []
                    values: list[Tensor] = []
                    for position, t in enumerate(tokens):
                        query, key = q[b, t, h], k[b, t, g]
                        if rotary is not None:
                            query, key = (rotate(x, rotary[0][position], rotary[1][position]) for x in (query, key))
                        keys.append(key)
                        values.append(v[b, t, g])
                        local = softmax_read(query, keys, values)
                        sigma_q = sigma(q[b, t, h], feature_map)
                        from_memory = sigma_q @ M_s / (sigma_q @ z_s + eps)
                        if corrected:
                            from_memory = sigma_q @ M_s[:, :-1] / (sigma_q @ M_s[:, -1] + eps)
                        share = torch.sigmoid(gate[h])
                        if first_segment == "local_only" and not z_s.any():
                            share = share * 0
                        out[b, t, h] = share * from_memory + (1 - share) * local
                M_next, z_next = M_s, z_s
                for t in tokens:
                    sigma_k = sigma(k[b, t, g], feature_map)
                    known = sigma_k @ M_s / (sigma_k @ z_s + eps) if update_rule == "delta" else 0
                    value = torch.cat((v[b, t, g], v.new_ones(1))) if corrected else v[b, t, g]
                    strength = 1 if write_gate is None else 2 * torch.sigmoid(k[b, t, g] @ write_gate[g])
                    M_next = M_next + strength * torch.outer(sigma_k, value - known)
                    z_next = z_next + strength * sigma_k
                M_s, z_s = M_next, z_next
            states[b, g] = M_s, z_s
    nothing = q.new_zeros(value_width)
    out_rows = [
        torch.stack([torch.stack([out.get((b, t, h), nothing) for h in range(num_heads)]) for t in range(num_tokens)])
        for b in range(batch_size)
    ]
    M_out, z_out = (
        torch.stack([torch.stack([states[b, g][i] for g in range(num_groups)]) for b in range(batch_size)]) for i in range(2)
    )
    return torch.stack(out_rows), M_out, z_out


HAND_CASES = [
    # σ(0) = 1, so with one token a segment M_1 = 2 and z_1 = 1; in the second A_mem = 2 and A_dot = 4, mixed half and half.
    ("linear", "paper", [1.0, 3.0], 6.0),
    ("linear", "local_only", [2.0, 3.0], 6.0),
    # The delta rule writes 4 - 2: it subtracts the value that the key already retrieves.
    ("delta", "paper", [1.0, 3.0], 4.0),
]


@pytest.mark.parametrize("update_rule, first_segment, outputs, memory", HAND_CASES)
def test_two_segments_of_one_token_agree_with_hand_calculation(
    update_rule: str, first_segment: str, outputs: list[float], memory: float
) -> None:
    q = k = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([2.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    gate = torch.zeros(1, dtype=torch.float64)
    options = {"segment_length": 1, "update_rule": update_rule, "first_segment": first_segment, "eps": 1e-12}

    out, M, z = oracle(q, k, v, gate, **options)
    assert out.flatten().tolist() == pytest.approx(outputs)
    assert (M.item(), z.item()) == pytest.approx((memory, 2.0))

    out, state = infini_attention(q, k, v, gate, **options)
    assert out.flatten().tolist() == pytest.approx(outputs)
    assert (state.M.item(), state.z.item()) == pytest.approx((memory, 2.0))


def test_oracle_rotates_halves_as_llama_does() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    cos, sin = torch.tensor([0.6, 0.0], dtype=torch.float64), torch.tensor([0.8, 1.0], dtype=torch.float64)
    # (x1, x3) turned by cos 0.6, sin 0.8; (x2, x4) turned by a right angle.
    assert rotate(x, cos, sin).tolist() == pytest.approx([0.6 - 2.4, -4.0, 1.8 + 0.8, 2.0])
