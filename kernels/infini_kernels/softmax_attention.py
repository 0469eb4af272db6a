"""Causal softmax attention of rows and of segments, by flash-attn or PyTorch.

Shapes: B batch, T tokens, N segments, W tokens of a segment in this call, H query heads, G key/value heads, D key width, Dv
value width; X rows of any kind.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from infini_kernels.arguments import Rotary
from infini_kernels.rotary import apply_rotary
from infini_kernels.timing import timed_as


def installed(name: str) -> bool:
    """Return whether a package of this name itself is installed.

    A folder of this name with packages in it does not count: flash-attn 4 installs flash_attn/cute and leaves flash_attn to
    version 2.
    """
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


FLASH_ATTENTION_2 = installed("flash_attn")
FLASH_ATTENTION_3 = installed("flash_attn_interface")
"""Only for Hopper GPUs."""
# Width of the widest head for which FlashAttention has a kernel.
FLASH_WIDEST_HEAD = 256
# Up to this many tokens per row, PyTorch's backward on a CPU is faster in float32 than in bfloat16: 3.5 times as fast at 64
# tokens (width 32, 4 heads), 0.75 times at 512 (width 64).
SHORT_ROW_ON_CPU = 128


_FAILURES: dict[str, str] = {}


@torch.compiler.assume_constant_result
def _failure(name: str) -> str:
    """Return why a package cannot be imported, or an empty string if it can be.

    A frequent reason is that its kernels were built for another version of PyTorch.
    """
    if name not in _FAILURES:
        try:
            import_module(name)
            _FAILURES[name] = ""
        except (ImportError, OSError) as error:
            _FAILURES[name] = f"{name} cannot be imported: {' '.join(str(error).split())}"
    return _FAILURES[name]


def _candidates(q: Tensor, v: Tensor) -> list[str]:
    """Return the installed flash-attn packages that have a kernel for these tensors, newest first."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or max(q.shape[-1], v.shape[-1]) > FLASH_WIDEST_HEAD:
        return []
    on_hopper = FLASH_ATTENTION_3 and torch.cuda.get_device_capability(q.device)[0] == 9
    return ["flash_attn_interface"] * on_hopper + ["flash_attn"] * FLASH_ATTENTION_2


def flash_attention_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """Return the newest flash-attn that can be imported and has a kernel for these tensors; None if there is none.

    The last dimension of the tensors is the head width.
    """
    for name in _candidates(q, v):
        if _failure(name):
            continue
        if name == "flash_attn":  # import statements, because torch.compile can trace them
            import flash_attn

            return flash_attn
        import flash_attn_interface

        return flash_attn_interface
    return None


def deterministic() -> bool:
    """Return whether the backward pass must give the same bits every time.

    By default the fused kernels sum the gradient of queries in the order in which their blocks finish. PyTorch's own
    kernels read the same setting.
    """
    return torch.are_deterministic_algorithms_enabled()


def local_attention_choice(q: Tensor, v: Tensor, grouped: bool = False) -> str:
    """Return the name of the implementation that computes attention of such tensors, for a log.

    Args:
        q: [..., D].
        v: [..., Dv].
        grouped: there are fewer key/value heads than query heads.
    """
    failed = "".join(f" ({failure})" for failure in map(_failure, _candidates(q, v)) if failure)
    flash_attn = flash_attention_for(q, v)
    if flash_attn is not None:
        return f"{flash_attn.__name__} {getattr(flash_attn, '__version__', '')}".strip() + failed
    if not q.is_cuda:
        return f"PyTorch {torch.__version__} on {q.device.type}{failed}"
    grouped = grouped and _has_grouped_kernel(q)
    q, k, v = (q.new_empty(1, heads, 16, max(q.shape[-1], v.shape[-1])) for heads in ((2, 1, 1) if grouped else (2, 2, 2)))
    number = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=grouped)
    return f"PyTorch {torch.__version__}, {SDPBackend(number).name.lower()}{failed}"


def _has_grouped_kernel(q: Tensor) -> bool:
    """Return whether PyTorch has a fused kernel for grouped heads.

    On CUDA it has none for float32, and would hold all scores in GPU memory.
    """
    return not q.is_cuda or q.dtype in (torch.float16, torch.bfloat16)


def equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of keys and values with zeros, which changes neither scores nor the outputs that are used.

    The fused kernels need one width. With two widths PyTorch would fall back to the full matrix of scores on the CPU.
    """
    missing = q.shape[-1] - v.shape[-1]
    if missing > 0:
        v = F.pad(v, (0, missing))
    elif missing < 0:
        q, k = F.pad(q, (0, -missing)), F.pad(k, (0, -missing))
    return q, k, v


@timed_as("local attention")
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(mask(Q K^T) / sqrt(D)) V for each row, with GPU or host memory linear in the number of tokens.

    q [X, T, H, D], k [X, T, G, D], v [X, T, G, Dv] -> [X, T, H, Dv]
    """
    scale, value_width = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = equal_widths(q, k, v)
    flash_attn = flash_attention_for(q, v)
    if flash_attn is not None:
        out = flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=deterministic())
        out = out[0] if isinstance(out, tuple) else out  # some versions return the normaliser too
    elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] <= SHORT_ROW_ON_CPU:
        out = _ShortRowsOnCpu.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale).transpose(1, 2)
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        if grouped and not _has_grouped_kernel(q):
            k, v, grouped = _repeat_for_query_heads(k, q), _repeat_for_query_heads(v, q), False
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    return out if out.shape[-1] == value_width else out[..., :value_width]


class _ShortRowsOnCpu(torch.autograd.Function):
    """Causal attention of short bfloat16 rows on a CPU, with a backward in float32.

    q [X, H, T, D], k, v [X, G, T, D] -> [X, H, T, D]
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads = q, _repeat_for_query_heads(k, q), _repeat_for_query_heads(v, q)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, log_sum = ctx.saved_tensors
        q, k, v, out = (x.float() for x in tensors)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient.float(),
            q,
            _repeat_for_query_heads(k, q),
            _repeat_for_query_heads(v, q),
            out,
            log_sum,
            0.0,
            True,
            scale=ctx.scale,
        )
        if (groups := k.shape[1]) != q.shape[1]:
            dk, dv = (x.unflatten(1, (groups, -1)).sum(dim=2) for x in (dk, dv))
        return *(x.to(gradient.dtype) for x in (dq, dk, dv)), None


def _repeat_for_query_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values [X, G, T, D] so that each query head of q [X, H, T, D] has its own."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


@timed_as("local attention")
def segment_attention(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None) -> Tensor:
    """Compute A_dot (arXiv 2404.07143, Section 2.2) for all segments at once, as rows of a larger batch.

    q [B, N, W, H, D], k [B, N, W, G, D], v [B, N, W, G, Dv] -> [B, N, W, H, Dv]. The rotary tables have at least W
    positions.
    """
    batch_size, num_segments, width = q.shape[:3]
    if rotary is not None:
        cos, sin = rotary[0][:width], rotary[1][:width]
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    out = causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # [B*N, W, H, Dv]
    return out.unflatten(0, (batch_size, num_segments))
