"""The memory operations as Triton kernels. Imported only where `backend` asks for them: Triton need not be installed."""

from infini_kernels.triton.blocks import supports
from infini_kernels.triton.operation import infini_attention_triton

__all__ = ["infini_attention_triton", "supports"]
