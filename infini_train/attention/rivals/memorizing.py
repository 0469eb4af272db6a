"""Baseline: the Memorizing Transformer (Wu et al., arXiv 2203.08913), Transformer-XL with a key-value bank in one layer.

Retrieval is exact: it takes the top_k largest scores over the whole bank, without an approximate index. As in the paper, the
bank takes no gradient, and a gate per head mixes the bank's output with attention over the current and the previous segment.
Scores are products of the layer's unrotated queries and keys. The paper normalises both, which needs a learned scale.

Shapes: B rows, N segments, S segment length, H query heads, G key/value heads, R = H / G, D head width, C bank_tokens, K top_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.attention.rivals.previous_segment import PreviousSegment, TransformerXLAttention
from infini_train.config import ModelConfig


class KeyValueBank(NamedTuple):
    """Keys and values of the newest segment and of the document's newest C tokens."""

    keys: Tensor  # [B, G, S, D], as in PreviousSegment
    values: Tensor  # [B, G, S, D]
    filled: Tensor  # [B] int64
    bank_keys: Tensor  # [B, G, C, D]; token t of the document is at index t mod C
    bank_values: Tensor  # [B, G, C, D]
    written: Tensor  # [B] int64: tokens of the document written so far; above C, the oldest were overwritten


class MemorizingAttention(TransformerXLAttention):
    """Transformer-XL attention with the key-value bank and a gate β [H]: the layer `model.bank_layer`."""

    memory_type = KeyValueBank

    def __init__(self, model: ModelConfig, num_heads: int, num_groups: int, context_tokens: int) -> None:
        super().__init__(model, num_heads, num_groups, context_tokens)
        self.gate = nn.Parameter(torch.full((num_heads,), float(model.initial_gate)))

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        bank = CarriedTensor((model.num_query_groups, model.bank_tokens, model.head_dim))
        written = CarriedTensor((), by_head=False, counter=True)
        return {**super().carried(model, layer_number), "bank_keys": bank, "bank_values": bank, "written": written}

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
        S, C, device = self.model.segment_length, self.model.bank_tokens, q.device
        assert memory is None or isinstance(memory, KeyValueBank)
        previous = None if memory is None else PreviousSegment(memory.keys, memory.values, memory.filled)
        near, newest = super().forward(q, k, v, reset=reset, lengths=lengths, memory=previous)
        assert isinstance(newest, PreviousSegment)
        if memory is None:
            empty = torch.zeros(B, k.shape[2], C, k.shape[3], dtype=newest.keys.dtype, device=device)
            bank = _Bank(empty, empty.clone(), torch.zeros(B, dtype=torch.int64, device=device))
        else:
            bank = _Bank(memory.bank_keys.clone(), memory.bank_values.clone(), memory.written)
        reset, lengths = reset.to(device), lengths.to(device)
        mixed = []
        for segment, (queries, keys, values, local) in enumerate(
            zip(*(x.unflatten(1, (N, S)).unbind(1) for x in (q, k, v, near)), strict=True)
        ):
            bank.forget(reset[:, segment])
            far, found = bank.read(queries, self.model.bank_top_k)
            share = self.gate.sigmoid()[:, None] * found[:, None, None, None]  # [B, 1, H, 1]: 0 while the bank is empty
            mixed.append(share * far.to(local.dtype) + (1 - share) * local)
            bank.write(keys.detach(), values.detach(), lengths[:, segment])
        leaving = KeyValueBank(newest.keys, newest.values, newest.filled, bank.keys, bank.values, bank.written)
        valid = (torch.arange(S, device=device) < lengths.unsqueeze(-1)).flatten(1)[..., None, None]  # [B, T, 1, 1]
        return torch.cat(mixed, dim=1).masked_fill(~valid, 0).to(v.dtype), leaving


class _Bank:
    """The bank during one micro-batch. It modifies its tensors in place, so the caller passes copies."""

    def __init__(self, keys: Tensor, values: Tensor, written: Tensor) -> None:
        self.keys, self.values, self.written = keys, values, written

    def forget(self, rows: Tensor) -> None:
        """Empty the bank in the given rows [B] bool, where a document begins."""
        self.written = self.written.masked_fill(rows, 0)

    def read(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Attend to the top_k best matches.

        Args:
            queries: [B, S, H, D].

        Returns:
            The output [B, S, H, D], and a float mask [B] that is 0 where the bank is empty.
        """
        S, H, D = queries.shape[1:]
        G, C = self.keys.shape[1:3]
        held = self.written.clamp(max=C)
        most = min(top_k, int(held.max()))
        if most == 0:
            return torch.zeros_like(queries), held.to(queries.dtype)
        grouped = queries.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).to(self.keys.dtype).flatten(2, 3)  # [B, G, R S, D]
        with torch.no_grad():
            place = torch.zeros(*grouped.shape[:3], most, dtype=torch.int64, device=queries.device)  # [B, G, R S, K]
            for row, count in enumerate(held.tolist()):  # rows may hold very different numbers of tokens
                scores = grouped[row] @ self.keys[row, :, :count].transpose(-1, -2)  # [G, R S, count]
                place[row, :, :, :count] = scores.topk(min(most, count), dim=-1).indices
            there = (torch.arange(most, device=queries.device) < held.unsqueeze(-1))[:, None, None]  # [B, 1, 1, K]
            taken = place.flatten(2).unsqueeze(-1).expand(-1, -1, -1, D)
            keys, values = (x.gather(2, taken).unflatten(2, place.shape[2:]) for x in (self.keys, self.values))
        # Compute the chosen scores again, for the gradient of the queries.
        scores = torch.einsum("bgsd,bgskd->bgsk", grouped, keys) / D**0.5
        # A row with an empty bank gets meaningless but finite weights; the caller multiplies its output by 0.
        weights = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(dim=-1)
        out = torch.einsum("bgsk,bgskd->bgsd", weights, values).unflatten(2, (H // G, S))
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3), (held > 0).to(queries.dtype)

    def write(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Write the valid tokens of a segment, keys and values [B, S, G, D], over the oldest tokens of each row."""
        S, C = keys.shape[1], self.keys.shape[2]
        offset = torch.arange(S, device=keys.device)
        # If a segment is longer than the bank, only its newest tokens are written.
        rows, tokens = ((offset < lengths.unsqueeze(1)) & (offset >= lengths.unsqueeze(1) - C)).nonzero(as_tuple=True)
        place = (self.written[rows] + tokens) % C
        self.keys[rows, :, place] = keys[rows, tokens].to(self.keys.dtype)
        self.values[rows, :, place] = values[rows, tokens].to(self.values.dtype)
        self.written = self.written + lengths
