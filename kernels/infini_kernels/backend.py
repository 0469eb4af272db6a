"""The choice between plain PyTorch and the Triton kernels."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
OLDEST_TRITON = (3, 4)


def _triton_is_usable() -> bool:
    """Whether triton is there and not too old, without importing it."""
    if find_spec("triton") is None:
        return False
    try:
        return tuple(int(number) for number in version("triton").split(".")[:2]) >= OLDEST_TRITON
    except (PackageNotFoundError, ValueError):
        return True  # a build under another name, as those of nightly versions: new


TRITON_USABLE = _triton_is_usable()


def takes_kernels(backend: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether tensors like these go to the kernels. 'auto' takes them on CUDA, where there are some for these tensors.

    Raises:
        ValueError: 'triton' is asked for and not possible.
    """
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return False
    if TRITON_USABLE:
        # Here, because a CPU needs none of it.
        from infini_kernels.triton import supports

        if supports(q, k, v):
            return True
    if backend == "auto":
        return False
    raise ValueError(
        f"backend is 'triton', which takes CUDA tensors of float16, bfloat16 or float32 with heads of at most 256, and the "
        f"package triton, 3.4 or later; q is {tuple(q.shape)} {q.dtype} on {q.device}"
        + ("" if TRITON_USABLE else ", and there is no such triton")
        + ": write 'auto' or 'reference'"
    )
