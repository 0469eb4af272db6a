"""How the tokens of a call fall into segments, and which of them are padding.

Shapes: B batch, T tokens, N segments, W tokens that a segment occupies in this call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_kernels.arguments import values_known


class SegmentLayout(NamedTuple):
    """T tokens as N segments of W. W is the segment length, or T where the call is shorter than one segment."""

    num_tokens: int
    num_segments: int
    width: int

    @classmethod
    def of(cls, num_tokens: int, segment_length: int) -> "SegmentLayout":
        return cls(num_tokens, -(-num_tokens // segment_length), min(num_tokens, segment_length))

    def fold(self, x: Tensor) -> Tensor:
        """[B, T, heads, width] -> [B, N, W, heads, width]; a partial last segment is filled up with zeros."""
        missing = self.num_segments * self.width - self.num_tokens
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (self.num_segments, self.width))

    def unfold(self, x: Tensor) -> Tensor:
        """[B, N, W, heads, width] -> [B, T, heads, width]"""
        x = x.flatten(1, 2)
        # The backward of a slice fills zeros in, even where it took everything.
        return x if x.shape[1] == self.num_tokens else x[:, : self.num_tokens]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. From pageable memory a copy to CUDA would wait until the device has done all that is queued before it."""
    if x.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def lengths_by_segment(lengths: Tensor, num_tokens: int, segment_length: int) -> Tensor:
    """Valid tokens of each segment [B, N], from those of each row [B] or of each segment [B, N]."""
    if lengths.dim() == 2:
        return lengths
    starts = torch.arange(0, num_tokens, segment_length, device=lengths.device)  # [N]
    return (lengths.unsqueeze(1) - starts).clamp(0, segment_length)


def all_full(lengths: Tensor, num_tokens: int) -> bool:
    """Whether lengths by segment [B, N] are known to leave no padding, as nearly all in training do."""
    # As Python's numbers, which are few: an operation of torch's takes longer.
    return values_known(lengths) and sum(lengths.flatten().tolist()) == lengths.shape[0] * num_tokens


def padding_mask(lengths: Tensor | None, num_tokens: int, segment_length: int, device: torch.device) -> Tensor | None:
    """True at padding [B, T, 1, 1], or None where there is none.

    None is also the answer for lengths on the CPU that turn out to be full.
    """
    if lengths is None:
        return None
    lengths = lengths_by_segment(lengths, num_tokens, segment_length)
    if all_full(lengths, num_tokens):
        return None
    position = torch.arange(num_tokens, device=lengths.device)  # [T]
    padding = position % segment_length >= lengths[:, position // segment_length]
    return to_device(padding, device)[:, :, None, None]
