"""Attention of the baselines whose memory is tokens, within one segment extended by memory tokens.

`infini_train.model.memory_token_layers` creates the memory tokens and passes them between segments. Each call here takes
one segment, whose hidden states are placed before or between the memory tokens.

Shapes: B rows, S segment length, P memory tokens, T = S + P or S + 2 P, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from infini_kernels.rotary import apply_rotary
from infini_train.attention.base import Attention
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.config import ModelConfig
from infini_train.runtime.errors import UserError


class MemoryTokens(NamedTuple):
    """Hidden states of memory tokens. A row of zeros is empty: it continues with the tokens of a document's start."""

    tokens: Tensor  # [B, P, h] float32


class _MemoryTokenAttention(Attention):
    """Softmax attention under `attention_mask`, with rotary embedding by the position in the extended segment."""

    memory_type = MemoryTokens

    def attention_mask(self, lengths: Tensor) -> Tensor:
        """Return the mask [B, 1, T, T] bool, True where a query attends to a key.

        Args:
            lengths: [B] number of valid tokens of the segment.
        """
        raise NotImplementedError

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
        cos, sin = self.rotary(q.shape[1], q.device)
        queries, keys = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self.attention_mask(lengths[:, 0].to(q.device)),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        raise UserError(
            f"model.attention is {self.model.attention}, which cannot stream token by token; generate with another attention"
        )


class RecurrentMemoryAttention(_MemoryTokenAttention):
    """Recurrent Memory Transformer (Bulatov et al., arXiv 2207.06881): causal over read tokens, segment and write tokens.

    The write tokens follow the segment, so they attend to all of it. The read tokens attend causally to each other only.
    """

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        if layer_number != 1:  # the model has one memory, which layer 1 carries
            return {}
        return {"tokens": CarriedTensor((model.memory_tokens, model.hidden_size), by_head=False)}

    def attention_mask(self, lengths: Tensor) -> Tensor:
        S, P = self.model.segment_length, self.model.memory_tokens
        place = torch.arange(S + 2 * P, device=lengths.device)
        there = (place < P + lengths[:, None]) | (place >= P + S)  # [B, T]
        # A padding token attends to itself, so that no row of the softmax is empty.
        return ((place <= place[:, None]) & (there[:, None] | (place == place[:, None]))).unsqueeze(1)


class FeedbackAttention(_MemoryTokenAttention):
    """TransformerFAM (Hwang et al., arXiv 2404.09173): the segment followed by feedback tokens, in every layer.

    The segment's tokens attend to the feedback of earlier segments and, causally, to each other. The feedback tokens attend to
    each other and to the whole segment. The paper's additional sliding window over earlier blocks is not implemented.
    """

    @classmethod
    def carried(cls, model: ModelConfig, layer_number: int) -> dict[str, CarriedTensor]:
        return {"tokens": CarriedTensor((model.memory_tokens, model.hidden_size), by_head=False)}

    def attention_mask(self, lengths: Tensor) -> Tensor:
        S, P = self.model.segment_length, self.model.memory_tokens
        place = torch.arange(S + P, device=lengths.device)
        feedback = place >= S
        there = (place < lengths[:, None]) | feedback  # [B, T]
        # The feedback tokens come last, so the causal mask already lets them attend to the whole segment.
        seen = feedback | (place <= place[:, None])  # [T, T]
        return (seen & (there[:, None] | (place == place[:, None]))).unsqueeze(1)
