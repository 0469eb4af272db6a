"""The choice between plain PyTorch and the Triton kernels."""

from importlib.util import find_spec

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
TRITON_INSTALLED = find_spec("triton") is not None


def takes_kernels(backend: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether tensors like these go to the kernels. 'auto' takes them on CUDA, where there are some for these tensors.

    Raises:
        ValueError: 'triton' is asked for and not possible.
    """
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return False
    if TRITON_INSTALLED:
        # Here, because a CPU needs none of it.
        from infini_kernels.triton import supports

        if supports(q, k, v):
            return True
    if backend == "auto":
        return False
    raise ValueError(
        f"backend is 'triton', which takes CUDA tensors of float16, bfloat16 or float32 with heads of at most 256, and the "
        f"package triton; q is {tuple(q.shape)} {q.dtype} on {q.device}"
        + ("" if TRITON_INSTALLED else ", and triton is not installed")
        + ": write 'auto' or 'reference'"
    )
