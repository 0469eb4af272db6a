"""Split of the tokens of a call into segments, and padding masks.

Shapes: B batch, T tokens, N segments, W tokens that a segment occupies in this call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_kernels.arguments import values_known


class SegmentLayout(NamedTuple):
    """T tokens as N segments of W tokens. W is the segment length, or T if the call is shorter than one segment."""

    num_tokens: int
    num_segments: int
    width: int

    @classmethod
    def of(cls, num_tokens: int, segment_length: int) -> "SegmentLayout":
        return cls(num_tokens, -(-num_tokens // segment_length), min(num_tokens, segment_length))

    def fold(self, x: Tensor) -> Tensor:
        """Reshape [B, T, heads, width] to [B, N, W, heads, width]; a partial last segment is padded with zeros."""
        missing = self.num_segments * self.width - self.num_tokens
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (self.num_segments, self.width))

    def unfold(self, x: Tensor) -> Tensor:
        """Reshape [B, N, W, heads, width] to [B, T, heads, width]."""
        x = x.flatten(1, 2)
        # The backward of a slice fills in zeros even if the slice takes everything.
        return x if x.shape[1] == self.num_tokens else x[:, : self.num_tokens]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move x to a device without blocking the host.

    A copy from pageable memory to CUDA would wait until the device has done all queued work, so x is pinned first.
    """
    if x.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def lengths_by_segment(lengths: Tensor, num_tokens: int, segment_length: int) -> Tensor:
    """Return the valid tokens of each segment [B, N], from those of each row [B] or of each segment [B, N]."""
    if lengths.dim() == 2:
        return lengths
    starts = torch.arange(0, num_tokens, segment_length, device=lengths.device)  # [N]
    return (lengths.unsqueeze(1) - starts).clamp(0, segment_length)


def all_full(lengths: Tensor, num_tokens: int) -> bool:
    """Return whether lengths by segment [B, N] are known to leave no padding, which is the usual case in training."""
    # Python numbers: there are only a few, and a torch operation takes longer.
    return values_known(lengths) and sum(lengths.flatten().tolist()) == lengths.shape[0] * num_tokens


def padding_mask(lengths: Tensor | None, num_tokens: int, segment_length: int, device: torch.device) -> Tensor | None:
    """Return a mask that is True at padding, [B, T, 1, 1]; None if there is no padding.

    It is also None for lengths on the CPU that turn out to be full.
    """
    if lengths is None:
        return None
    lengths = lengths_by_segment(lengths, num_tokens, segment_length)
    if all_full(lengths, num_tokens):
        return None
    position = torch.arange(num_tokens, device=lengths.device)  # [T]
    padding = position % segment_length >= lengths[:, position // segment_length]
    return to_device(padding, device)[:, :, None, None]
