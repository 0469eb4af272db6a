"""Memory operations of Infini-attention (arXiv 2404.07143) and plain attentions. Depends only on torch."""

from infini_kernels.documents import document_attention
from infini_kernels.local import local_attention
from infini_kernels.memory import MemoryState
from infini_kernels.operation import infini_attention, memory_choice
from infini_kernels.softmax_attention import local_attention_choice
from infini_kernels.streaming import SegmentCache, infini_attention_step, local_attention_step

__all__ = [
    "MemoryState",
    "SegmentCache",
    "document_attention",
    "infini_attention",
    "infini_attention_step",
    "local_attention",
    "local_attention_choice",
    "local_attention_step",
    "memory_choice",
]
