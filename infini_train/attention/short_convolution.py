"""A short causal convolution over queries and keys, one filter a channel: a token is written under the words before it.

Not in the Infini-attention paper. A memory is asked "what came after these words?", but a key is made of the very token that is
to be found. The convolution gives queries and keys the last W tokens, and keys one token later than queries, with the same
filters: the key of token t sees t - W ... t - 1, and so does the query of token t - 1. Equal words thus lead to what came after
them from the first step on. H3 (arXiv 2212.14052) shifts its keys for the same end, and smeared keys were seen to let induction
heads form sooner (Olsson et al., arXiv 2209.11895). benchmarks/recipes.md has what it gives here.

It looks at no token before the segment, so what crosses a segment's start is the memory alone, as without it.

Shapes: B rows, N segments, S segment length, T tokens, t tokens of a chunk, H query heads, G key/value heads, D head width,
W width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from infini_train.config import ModelConfig


@dataclass(frozen=True)
class ConvolutionTail:
    """What the next tokens of an unfinished segment still see of it; zeros stand for tokens before its start."""

    queries: Tensor  # [B, H × D, W - 1]
    keys: Tensor  # [B, G × D, W]
    length: int = 0  # tokens of the segment so far


class ShortConvolution(nn.Module):
    """Owns the filters [G, D, W] of the key/value heads that this process holds; the query heads of a group share them."""

    def __init__(self, model: ModelConfig, num_groups: int) -> None:
        super().__init__()
        self.segment_length, self.width = model.segment_length, model.short_convolution
        self.weight = nn.Parameter(torch.empty(num_groups, model.head_dim, self.width))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch, whose last segment may be short: q [B, T, H, D], k [B, T, G, D] -> the same shapes."""
        queries = self._filter(functional.pad(self._by_segment(q), (self.width - 1, 0)))
        keys = self._filter(functional.pad(self._by_segment(k), (self.width, -1)))
        return _tokens_first(queries, q), _tokens_first(keys, k)

    def empty_tail(self, batch_size: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> ConvolutionTail:
        """The tail at a segment's start."""
        groups, head_dim, width = self.weight.shape
        return ConvolutionTail(
            torch.zeros(batch_size, num_heads * head_dim, width - 1, dtype=dtype, device=device),
            torch.zeros(batch_size, groups * head_dim, width, dtype=dtype, device=device),
        )

    def step(self, q: Tensor, k: Tensor, tail: ConvolutionTail) -> tuple[Tensor, Tensor, ConvolutionTail]:
        """The next tokens of a stream, none beyond the segment's end: q [B, t, H, D], k [B, t, G, D] -> the same and a tail."""
        queries = torch.cat([tail.queries, _channels_first(q)], dim=-1)
        keys = torch.cat([tail.keys, _channels_first(k)], dim=-1)
        length = tail.length + q.shape[1]
        if length == self.segment_length:
            after = ConvolutionTail(torch.zeros_like(tail.queries), torch.zeros_like(tail.keys))
        else:
            after = ConvolutionTail(queries[..., 1 - self.width :], keys[..., -self.width :], length)
        return _tokens_first(self._filter(queries), q), _tokens_first(self._filter(keys[..., :-1]), k), after

    def _by_segment(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [B × N, heads × D, S]."""
        if missing := -x.shape[1] % self.segment_length:
            x = functional.pad(x, (0, 0, 0, 0, 0, missing))
        return _channels_first(x.unflatten(1, (-1, self.segment_length)).flatten(0, 1))

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
