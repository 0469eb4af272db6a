"""Triton kernels of the memory operations. Imported only if `backend` selects them, so that Triton is optional."""

from infini_kernels.triton.blocks import supports
from infini_kernels.triton.operation import infini_attention_triton

__all__ = ["infini_attention_triton", "supports"]
