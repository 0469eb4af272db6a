"""Baseline: the linear transformer (Katharopoulos et al., arXiv 2006.16236), with the same state as Infini-attention.

It has no softmax and no gate: every token reads the sums over itself and all tokens before it. Token order enters through the
rotary embedding of φ(Q) and φ(K) in the numerator (RoFormer, arXiv 2104.09864, Section 3.3), by position in the document.
Without it the output would not depend on the order of the tokens.

Shapes: B rows, N segments, S segment length, T = N S tokens, H query heads, G key/value heads, R = H / G, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.recurrence import walk
from infini_kernels.rotary import apply_rotary
from infini_train.attention.base import Attention
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.attention.rotary_frequencies import rotary_frequencies
from infini_train.config import ModelConfig


class LinearState(NamedTuple):
    """Sums over the tokens of a document so far."""

    M: Tensor  # [B, G, D, D]: sum of rotated φ(k) v^T
    z: Tensor  # [B, G, D]: sum of φ(k)
    tokens: Tensor  # [B] int64: number of tokens summed


class LinearAttention(Attention):
    """Causal linear attention over whole documents, computed segment by segment. The result is exact at any segment length."""

    memory_type = LinearState

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        groups, width = model.num_query_groups, model.head_dim
        return {
            "M": CarriedTensor((groups, width, width)),
            "z": CarriedTensor((groups, width)),
            "tokens": CarriedTensor((), by_head=False, counter=True),
        }

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        reset: Tensor,
        lengths: Tensor,
        memory: LayerMemory | None,
        group: ProcessGroup | None = None,
        repeats: Tensor | None = None,
    ) -> tuple[Tensor, LayerMemory | None]:
        B, N = reset.shape
        S, G, D, device = self.model.segment_length, k.shape[2], k.shape[3], q.device
        dtype = torch.promote_types(q.dtype, torch.float32)
        assert memory is None or isinstance(memory, LinearState)
        if memory is None:
            zeros = torch.zeros(B, G, D, D, dtype=dtype, device=device)
            memory = LinearState(zeros, zeros[..., 0], torch.zeros(B, dtype=torch.int64, device=device))
        reset, lengths = reset.to(device), lengths.to(device)
        valid = torch.arange(S, device=device) < lengths.unsqueeze(-1)  # [B, N, S]
        starts, tokens = _positions(memory.tokens, lengths, reset)
        cos, sin = self._angles((starts.unsqueeze(-1) + torch.arange(S, device=device)).flatten(1))
        phi_q = torch.nn.functional.elu(q.to(dtype)) + 1
        phi_k = (torch.nn.functional.elu(k.to(dtype)) + 1) * valid.flatten(1)[..., None, None]

        def by_segment(x: Tensor) -> Tensor:
            """Reshape [B, T, heads, D] to [B, N, G, R, S, D]; R is 1 for keys and values."""
            return x.unflatten(1, (N, S)).unflatten(3, (G, -1)).permute(0, 1, 3, 4, 2, 5)

        phi_q, phi_k, rotated_q, rotated_k, values = map(
            by_segment, (phi_q, phi_k, apply_rotary(phi_q, cos, sin), apply_rotary(phi_k, cos, sin), v.to(dtype))
        )
        entering_M, leaving_M = walk(memory.M, (rotated_k.transpose(-1, -2) @ values).squeeze(3), reset)
        entering_z, leaving_z = walk(memory.z, phi_k.sum(dim=-2).squeeze(3), reset)
        numerator = (rotated_q @ rotated_k.transpose(-1, -2)).tril() @ values + rotated_q @ entering_M.unsqueeze(3)
        seen_z = entering_z[:, :, :, None, None] + running_sum(
            phi_k, phi_k.is_cuda and torch.are_deterministic_algorithms_enabled()
        )  # [B, N, G, 1, S, D]
        denominator = (phi_q * seen_z).sum(dim=-1, keepdim=True) + self.model.memory_eps
        out = (numerator / denominator).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)  # [B, T, H, D]
        out = out.masked_fill(~valid.flatten(1)[..., None, None], 0).to(v.dtype)
        return out, LinearState(leaving_M, leaving_z, tokens)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) for positions [B, T], each [B, T, D/2] float32.

        Angles are computed in float64, because float32 is too coarse for positions beyond a million.
        """
        angle = positions.unsqueeze(-1) * rotary_frequencies(self.model, positions.device)
        return angle.cos().float(), angle.sin().float()


def running_sum(x: Tensor, same_bits: bool) -> Tensor:
    """Return the cumulative sum of x [..., S, D] over tokens.

    Args:
        same_bits: compute it as a matrix product. PyTorch's cumsum on CUDA is not deterministic, and raises an error when
            deterministic algorithms are required.
    """
    if not same_bits:
        return x.cumsum(dim=-2)
    return torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device).tril() @ x


def _positions(tokens: Tensor, lengths: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the document position of each segment's first token [B, N] and of the token after the last segment [B]."""
    starts = []
    for segment in range(reset.shape[1]):
        tokens = tokens.masked_fill(reset[:, segment], 0)
        starts.append(tokens)
        tokens = tokens + lengths[:, segment]
    return torch.stack(starts, dim=1), tokens
