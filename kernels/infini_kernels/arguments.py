"""Validation of arguments. Each error names the wrong argument and the value that it conflicts with.

Shapes: B batch, T tokens, N segments, H query heads, G key/value heads, D key width, Dv value width.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from infini_kernels.memory import MemoryState, memory_dtype
from infini_kernels.variants import NORMALISERS

Rotary: TypeAlias = tuple[Tensor, Tensor]  # (cos, sin), each [positions, D/2]

UPDATE_RULES = ("linear", "delta")
FIRST_SEGMENT_MIXES = ("paper", "local_only")

# The backward pass squares 1 / eps in float32.
SMALLEST_EPS = 1e-12


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def check_segment_length(segment_length: int) -> None:
    if segment_length < 1:
        raise ValueError(f"segment_length is {segment_length}, but a segment has at least 1 token")


def check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps >= SMALLEST_EPS):
        raise ValueError(f"eps is {eps}, but must be finite and at least {SMALLEST_EPS}: float32 must hold 1 / eps**2")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q [B, T, H, D], k [B, T, G, D] and v [B, T, G, Dv]: H is a multiple of G; one floating type, one device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but 4 dimensions are needed: batch, tokens, heads, width")
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but every dimension must be at least 1")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, but attention needs a floating-point type")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but q is {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}")
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"k has batch and tokens {list(k.shape[:2])} but q has {list(q.shape[:2])}: q {list(q.shape)}, k {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v has batch, tokens and heads {list(v.shape[:3])} but k has {list(k.shape[:3])}: "
            f"k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"k has width {k.shape[3]} but q has width {q.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads but q has {q.shape[2]}, which is not a multiple")


def check_gate(gate: Tensor | None, q: Tensor) -> None:
    """Check gate [H]: one scalar β per query head, before the sigmoid."""
    if gate is None:
        raise ValueError("gate is None, but infini_attention needs one β per query head; use local_attention for no memory")
    if list(gate.shape) != [q.shape[2]]:
        raise ValueError(f"gate has shape {list(gate.shape)} but q has {q.shape[2]} heads: [{q.shape[2]}] is needed")
    if not gate.is_floating_point():
        raise ValueError(f"gate is {gate.dtype}, but must have a floating-point type (q is {q.dtype})")
    if gate.device != q.device:
        raise ValueError(f"gate is on {gate.device} but q is on {q.device}")


def check_write_gate(write_gate: Tensor | None, k: Tensor) -> None:
    """Check write_gate [G, D]."""
    if write_gate is None:
        return
    needed = list(k.shape[2:])
    if list(write_gate.shape) != needed:
        raise ValueError(f"write_gate has shape {list(write_gate.shape)}, but k {list(k.shape)} needs {needed}")
    if not write_gate.is_floating_point():
        raise ValueError(f"write_gate is {write_gate.dtype}, but must have a floating-point type (k is {k.dtype})")
    if write_gate.device != k.device:
        raise ValueError(f"write_gate is on {write_gate.device} but k is on {k.device}")


def check_normaliser(normaliser: str, update_rule: str) -> None:
    check_choice("normaliser", normaliser, NORMALISERS)
    if normaliser == "corrected" and update_rule != "delta":
        raise ValueError(
            f"normaliser is 'corrected', which needs update_rule 'delta', but update_rule is {update_rule!r}: write 'paper'"
        )


def check_memory(memory: MemoryState | None, k: Tensor, v: Tensor, normaliser: str = "paper") -> None:
    """Check the memory: M [B, G, D, Dv] and z [B, G, D], in the memory type for k's type, on k's device.

    With the corrected normaliser M is [B, G, D, Dv + 1].
    """
    if memory is None:
        return
    batch_size, _, num_groups, key_width = k.shape
    shapes = {
        "M": [batch_size, num_groups, key_width, v.shape[3] + (normaliser == "corrected")],
        "z": [batch_size, num_groups, key_width],
    }
    needed = memory_dtype(k.dtype)
    for name, tensor in (("M", memory.M), ("z", memory.z)):
        if list(tensor.shape) != shapes[name]:
            raise ValueError(
                f"memory.{name} has shape {list(tensor.shape)}, but k {list(k.shape)} and v {list(v.shape)} need {shapes[name]}"
            )
        if tensor.dtype != needed:
            raise ValueError(f"memory.{name} is {tensor.dtype}, but beside k of {k.dtype} it must be {needed}")
        if tensor.device != k.device:
            raise ValueError(f"memory.{name} is on {tensor.device} but k is on {k.device}")


def check_rotary(rotary: Rotary | None, q: Tensor, positions: int, positions_name: str) -> None:
    """Check cos and sin: each [positions, D/2], on q's device."""
    if rotary is None:
        return
    width = q.shape[3]
    if width % 2:
        raise ValueError(f"rotary rotates halves, but q has odd width {width}")
    if len(rotary) != 2:
        raise ValueError(f"rotary has {len(rotary)} entries, but is a pair (cos, sin)")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if list(table.shape) != [positions, width // 2]:
            raise ValueError(
                f"rotary {name} has shape {list(table.shape)}, but {positions_name} {positions} and width {width} of q "
                f"need {[positions, width // 2]}"
            )
        if not table.is_floating_point():
            raise ValueError(f"rotary {name} is {table.dtype}, but must have a floating-point type (q is {q.dtype})")
        if table.device != q.device:
            raise ValueError(f"rotary {name} is on {table.device} but q is on {q.device}")


def check_reset(reset: Tensor | None, batch_size: int, num_segments: int) -> None:
    """Check reset: [B, N] bool."""
    if reset is None:
        return
    if reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}, but must be torch.bool")
    if list(reset.shape) != [batch_size, num_segments]:
        raise ValueError(
            f"reset has shape {list(reset.shape)}, but {batch_size} rows of {num_segments} segments need "
            f"{[batch_size, num_segments]}"
        )


def check_repeats(repeats: Tensor | None, batch_size: int, num_segments: int) -> None:
    """Check repeats: [B, N], whole numbers of at least 1. Values are checked only if they are on the CPU."""
    if repeats is None:
        return
    if list(repeats.shape) != [batch_size, num_segments]:
        raise ValueError(
            f"repeats has shape {list(repeats.shape)}, but {batch_size} rows of {num_segments} segments need "
            f"{[batch_size, num_segments]}"
        )
    if values_known(repeats) and bool((repeats < 1).any()):
        raise ValueError(f"repeats holds {float(repeats.min())}, but a segment is written at least once")
    if values_known(repeats) and (fractions := repeats[repeats != repeats.round()]).numel():
        raise ValueError(f"repeats holds {float(fractions[0])}, but a segment is written a whole number of times")


def check_lengths(lengths: Tensor | None, batch_size: int, num_tokens: int, segment_length: int) -> None:
    """Check lengths: [B] in 0 .. T, or [B, N] in 0 .. tokens of the segment.

    The range is checked only if lengths is on the CPU, because reading it from an accelerator would stall its queue.
    """
    if lengths is None:
        return
    num_segments = -(-num_tokens // segment_length)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lengths is {lengths.dtype}, but counts tokens: use torch.int64 or torch.int32")
    if list(lengths.shape) not in ([batch_size], [batch_size, num_segments]):
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}, but {batch_size} rows of {num_segments} segments need "
            f"{[batch_size]} or {[batch_size, num_segments]}"
        )
    if not values_known(lengths):
        return
    # Python numbers: there are only a few, and a single torch operation takes as long as this whole check.
    counts = lengths.flatten().tolist()
    if lengths.dim() == 1:
        most = [num_tokens] * batch_size
        limit = f"q has {num_tokens} tokens"
    else:
        most = [min(segment_length, num_tokens - start) for start in range(0, num_tokens, segment_length)] * batch_size
        limit = f"segments of segment_length {segment_length} in {num_tokens} tokens of q hold no more"
    if min(counts) < 0:
        raise ValueError(f"lengths holds {min(counts)}, but a number of tokens is at least 0")
    too_long = [count for count, limit_here in zip(counts, most, strict=True) if count > limit_here]
    if too_long:
        raise ValueError(f"lengths holds {too_long[0]} but {limit}")


def values_known(x: Tensor) -> bool:
    """Return whether values can be read without stalling an accelerator's queue or breaking torch.compile's graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
