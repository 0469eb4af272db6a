"""A short causal depthwise convolution over queries and keys: the key of a token is built from the tokens before it.

It is not in the Infini-attention paper. To continue a text, the memory must find the token that followed the current words
earlier. Without the convolution, the key of that token is built from the token itself, which the query does not know yet.

The convolution mixes W tokens into each query and key, with the same filters for both. Keys are delayed by one token: the key
of token t is built from tokens t - W ... t - 1, and so is the query of token t - 1. From the first step on, equal words
therefore retrieve the token that followed them. H3 (arXiv 2212.14052) shifts its keys for the same purpose, and smeared keys
let induction heads form sooner (Olsson et al., arXiv 2209.11895). See benchmarks/recipes.md for results.

`model.short_convolution_reach` sets the reach at a segment's start. With `segment` the convolution starts from zeros, so only
the memory crosses segment boundaries. With `document` it uses the last W tokens of the previous segment of the same document;
these tokens are then carried with the memory.

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
    """The state that a layer carries if its convolution crosses segment boundaries."""

    M: Tensor  # [B, G, D, Dv]
    z: Tensor  # [B, G, D]
    tail: Tensor
    """[B, G, R + 1, W, D]: the last W queries of each group's heads and its last W keys, before the convolution. Queries need
    only W - 1 tokens, so the oldest query is unused; one tensor for both is simpler."""

    @classmethod
    def joined(cls, memory: LayerMemory, tail: Tensor) -> MemoryWithTail:
        """Combine the memory of an Infini-attention layer with the tail of its convolution."""
        M, z = memory
        return cls(M, z, tail)

    @property
    def memory(self) -> MemoryState:
        """The memory without the tail."""
        return MemoryState(self.M, self.z)


def without_tail(carried: LayerMemory) -> LayerMemory:
    """Return the memory of a layer without the convolution tail, if it has one."""
    return carried.memory if isinstance(carried, MemoryWithTail) else carried


def with_memory(carried: LayerMemory, memory: LayerMemory) -> LayerMemory:
    """Replace the memory in the state of a layer and keep its convolution tail, if it has one."""
    return MemoryWithTail.joined(memory, carried.tail) if isinstance(carried, MemoryWithTail) else memory


@dataclass(frozen=True)
class ConvolutionTail:
    """Inputs of the convolution that the next tokens of a stream still need; zeros for tokens before its start."""

    queries: Tensor  # [B, H × D, W - 1]
    keys: Tensor  # [B, G × D, W]
    length: int = 0  # tokens of the current segment so far


class ShortConvolution(nn.Module):
    """The convolution of one layer. A key/value head and the query heads of its group share filters; weight: [G, D, W]."""

    def __init__(self, model: ModelConfig, num_groups: int) -> None:
        super().__init__()
        self.segment_length, self.width = model.segment_length, model.short_convolution
        self.crosses_borders = model.short_convolution_reach == "document"
        self.weight = nn.Parameter(torch.empty(num_groups, model.head_dim, self.width))

    @staticmethod
    def carried(model: ModelConfig) -> CarriedTensor:
        """Return the declaration of one row's tail, over all heads."""
        heads = model.num_attention_heads // model.num_query_groups + 1
        return CarriedTensor((model.num_query_groups, heads, model.short_convolution, model.head_dim))

    def forward(
        self, q: Tensor, k: Tensor, reset: Tensor, tail: Tensor | None = None, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Filter the queries and keys of a micro-batch. Its last segment may be short if its document ends there.

        Args:
            q: [B, T, H, D].
            k: [B, T, G, D].
            reset: [B, N] bool, True where a document begins in that segment.
            tail: `MemoryWithTail.tail` after the stream's previous micro-batch; None at the stream's start.
            group: context-parallel group; each rank holds a contiguous run of the segments, in rank order.

        Returns:
            q and k in their shapes, and the tail after the last segment (None unless the convolution crosses segments).
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
        """Create the tail at a document's start."""
        groups, head_dim, width = self.weight.shape
        return ConvolutionTail(
            torch.zeros(batch_size, num_heads * head_dim, width - 1, dtype=dtype, device=device),
            torch.zeros(batch_size, groups * head_dim, width, dtype=dtype, device=device),
        )

    def step(self, q: Tensor, k: Tensor, tail: ConvolutionTail) -> tuple[Tensor, Tensor, ConvolutionTail]:
        """Filter the next tokens of a stream: q [B, t, H, D], k [B, t, G, D] -> the same shapes, and the new tail.

        The chunk must not cross the end of a segment.
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
        """Return the last W tokens of each segment in the layout of the tail: [B, N, G, R + 1, W, D]."""
        queries, keys = (self._whole_segments(x)[:, :, -self.width :] for x in (q, k))  # [B, N, W, heads, D]
        both = torch.cat([queries.unflatten(3, (k.shape[2], -1)), keys.unsqueeze(4)], dim=4)
        return both.permute(0, 1, 3, 4, 2, 5)

    def _whole_segments(self, x: Tensor) -> Tensor:
        """Reshape [B, T, heads, D] to [B, N, S, heads, D]; a short last segment is padded with zeros."""
        if missing := -x.shape[1] % self.segment_length:
            x = functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (-1, self.segment_length))

    def _by_segment(self, x: Tensor) -> Tensor:
        """Reshape [B, T, heads, D] to [B × N, heads × D, S]."""
        return _channels_first(self._whole_segments(x).flatten(0, 1))

    def _filter(self, x: Tensor) -> Tensor:
        """Convolve each channel: [b, C, W - 1 + t] -> [b, C, t]."""
        heads_of_a_group = x.shape[1] // self.weight[..., 0].numel()
        filters = self.weight.repeat_interleave(heads_of_a_group, dim=0).flatten(0, 1).unsqueeze(1)  # [C, 1, W]
        return functional.conv1d(x, filters, groups=x.shape[1])


def _channels_first(x: Tensor) -> Tensor:
    """Reshape [b, t, heads, D] to [b, heads × D, t]."""
    return x.flatten(2).transpose(1, 2)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """Reshape [b, heads × D, t] to [B, T, heads, D] with T as in `like`. Storage is token-major, as in Megatron-core."""
    x = x.unflatten(0, (len(like), -1)).permute(1, 3, 0, 2).flatten(0, 1).contiguous()
    return x.transpose(0, 1).unflatten(2, like.shape[2:])[:, : like.shape[1]]
