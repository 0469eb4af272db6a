"""A short causal convolution over queries and keys, with one filter per channel.

Not in the Infini-attention paper. A query asks for the token that followed some words, but a key is made of that token
itself. The convolution gives queries and keys the last W tokens, and keys one token later than queries, with the same
filters: the key of token t sees t - W ... t - 1, and so does the query of token t - 1. From the first step on, equal
words therefore find the token after them. H3 (arXiv 2212.14052) shifts its keys for the same purpose. With smeared keys,
induction heads form sooner (Olsson et al., arXiv 2209.11895). docs/results/retrieval-trials.md has measurements.

`model.short_convolution_reach` chooses its input at a segment's start. With `segment` it is zeros, so only the memory crosses
the border. With `document` it is the last W tokens of the segment before, if they are of the same document; they travel
beside the memory.

Shapes: B rows, N segments, S segment length, T tokens, t tokens of a chunk, H query heads, G key/value heads, R = H / G query
heads of a group, D head width, W width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from infini_kernels import MemoryState
from infini_kernels.context_parallel import pass_to_next_rank
from infini_kernels.segments import to_device, values_known
from infini_train.attention.layer_memory import CarriedTensor, LayerMemory
from infini_train.config import ModelConfig


class MemoryWithTail(NamedTuple):
    """Memory of a layer whose convolution crosses the borders of segments."""

    M: Tensor  # [B, G, D, Dv]
    z: Tensor  # [B, G, D]
    tail: Tensor
    """[B, G, R + 1, W, D]: the newest queries of each group's heads, and its newest keys, before the convolution. It looks
    one token less far back from a query than from a key, so of the queries the oldest is unused: one tensor is simpler."""

    @classmethod
    def joined(cls, memory: LayerMemory, tail: Tensor) -> MemoryWithTail:
        """Return the memory of Infini-attention together with the convolution's tail."""
        M, z = memory
        return cls(M, z, tail)

    @property
    def memory(self) -> MemoryState:
        """Return the memory without the tail."""
        return MemoryState(self.M, self.z)


def without_tail(carried: LayerMemory) -> LayerMemory:
    """Return the memory of a layer without the convolution's tail, if it has one."""
    return carried.memory if isinstance(carried, MemoryWithTail) else carried


def with_memory(carried: LayerMemory, memory: LayerMemory) -> LayerMemory:
    """Return `carried` with another memory and the same tail."""
    return MemoryWithTail.joined(memory, carried.tail) if isinstance(carried, MemoryWithTail) else memory


@dataclass(frozen=True)
class ConvolutionTail:
    """Input of the convolution for the next tokens of a stream; zeros before its start."""

    queries: Tensor  # [B, H × D, W - 1]
    keys: Tensor  # [B, G × D, W]
    length: int = 0  # tokens of the segment so far


class ShortConvolution(nn.Module):
    """The convolution of this process's heads.

    It owns filters [G, D, W], one per channel of each key/value head. The query heads of a group share them.
    """

    def __init__(self, model: ModelConfig, num_groups: int) -> None:
        super().__init__()
        self.segment_length, self.width = model.segment_length, model.short_convolution
        self.crosses_borders = model.short_convolution_reach == "document"
        self.weight = nn.Parameter(torch.empty(num_groups, model.head_dim, self.width))

    @staticmethod
    def carried(model: ModelConfig) -> CarriedTensor:
        """Return the description of one row's tail, over all heads."""
        heads = model.num_attention_heads // model.num_query_groups + 1
        return CarriedTensor((model.num_query_groups, heads, model.short_convolution, model.head_dim))

    def forward(
        self, q: Tensor, k: Tensor, reset: Tensor, tail: Tensor | None = None, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Convolve a micro-batch. Its last segment may be short.

        Args:
            q: [B, T, H, D].
            k: [B, T, G, D].
            reset: [B, N] bool, True where a document begins in that segment.
            tail: `MemoryWithTail.tail` as the stream's previous micro-batch left it; None at the stream's start.
            group: processes that share the segments in contiguous runs, in rank order.

        Returns:
            q and k in their shapes, and the tail after the micro-batch; None unless the convolution crosses borders.
        """
        queries, keys = self._by_segment(q), self._by_segment(k)
        if not self.crosses_borders:
            queries, keys = functional.pad(queries, (self.width - 1, 0)), functional.pad(keys, (self.width, -1))
            return _tokens_first(self._filter(queries), q), _tokens_first(self._filter(keys), k), None
        ends = self._ends(q, k)
        dtype = torch.promote_types(q.dtype, torch.float32)
        leaving = ends[:, -1].to(dtype, copy=True)  # a view would keep the tails of all segments alive
        entering = torch.zeros_like(leaving) if tail is None else tail
        if group is not None:
            entering, leaving = pass_to_next_rank(entering, leaving, group)
        before = torch.cat([entering.to(q.dtype).unsqueeze(1), ends[:, :-1]], dim=1)
        if not values_known(reset) or bool(reset.any()):
            before = before.masked_fill(to_device(reset, q.device)[..., None, None, None, None], 0)
        before = before.flatten(0, 1).transpose(-1, -2)  # [B × N, G, R + 1, D, W]
        queries = torch.cat([before[:, :, :-1, :, 1:].flatten(1, 3), queries], dim=-1)
        keys = torch.cat([before[:, :, -1].flatten(1, 2), keys[..., :-1]], dim=-1)
        return _tokens_first(self._filter(queries), q), _tokens_first(self._filter(keys), k), leaving

    def empty_tail(self, batch_size: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> ConvolutionTail:
        """Return the tail at a document's start."""
        groups, head_dim, width = self.weight.shape
        return ConvolutionTail(
            torch.zeros(batch_size, num_heads * head_dim, width - 1, dtype=dtype, device=device),
            torch.zeros(batch_size, groups * head_dim, width, dtype=dtype, device=device),
        )

    def step(self, q: Tensor, k: Tensor, tail: ConvolutionTail) -> tuple[Tensor, Tensor, ConvolutionTail]:
        """Convolve the next tokens of a stream, up to the segment's end.

        q [B, t, H, D], k [B, t, G, D] -> the same shapes and the tail.
        """
        queries = torch.cat([tail.queries, _channels_first(q)], dim=-1)
        keys = torch.cat([tail.keys, _channels_first(k)], dim=-1)
        length = (tail.length + q.shape[1]) % self.segment_length
        if length == 0 and not self.crosses_borders:
            after = ConvolutionTail(torch.zeros_like(tail.queries), torch.zeros_like(tail.keys))
        else:
            after = ConvolutionTail(queries[..., 1 - self.width :], keys[..., -self.width :], length)
        return _tokens_first(self._filter(queries), q), _tokens_first(self._filter(keys[..., :-1]), k), after

    def _ends(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the last tokens of each segment in the layout of the tail: [B, N, G, R + 1, W, D]."""
        queries, keys = (self._whole_segments(x)[:, :, -self.width :] for x in (q, k))  # [B, N, W, heads, D]
        both = torch.cat([queries.unflatten(3, (k.shape[2], -1)), keys.unsqueeze(4)], dim=4)
        return both.permute(0, 1, 3, 4, 2, 5)

    def _whole_segments(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [B, N, S, heads, D], zeros behind a last segment that is short."""
        if missing := -x.shape[1] % self.segment_length:
            x = functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (-1, self.segment_length))

    def _by_segment(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [B × N, heads × D, S]."""
        return _channels_first(self._whole_segments(x).flatten(0, 1))

    def _filter(self, x: Tensor) -> Tensor:
        """[b, C, W - 1 + t] -> [b, C, t]."""
        heads_of_a_group = x.shape[1] // self.weight[..., 0].numel()
        filters = self.weight.repeat_interleave(heads_of_a_group, dim=0).flatten(0, 1).unsqueeze(1)  # [C, 1, W]
        return functional.conv1d(x, filters, groups=x.shape[1])


def _channels_first(x: Tensor) -> Tensor:
    """[b, t, heads, D] -> [b, heads × D, t]."""
    return x.flatten(2).transpose(1, 2)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """[b, heads × D, t] -> [B, T, heads, D], as many tokens as `like` has; in memory token by token, as Megatron-core does."""
    x = x.unflatten(0, (len(like), -1)).permute(1, 3, 0, 2).flatten(0, 1).contiguous()
    return x.transpose(0, 1).unflatten(2, like.shape[2:])[:, : like.shape[1]]
