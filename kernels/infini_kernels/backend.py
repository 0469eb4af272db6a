"""Choice between plain PyTorch and the Triton kernels."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
OLDEST_TRITON = (3, 4)


def _triton_is_usable() -> bool:
    """Return whether triton is installed and recent enough, without importing it."""
    if find_spec("triton") is None:
        return False
    try:
        return tuple(int(number) for number in version("triton").split(".")[:2]) >= OLDEST_TRITON
    except (PackageNotFoundError, ValueError):
        return True  # a build with another name, such as a nightly: assume that it is recent


TRITON_USABLE = _triton_is_usable()


def uses_triton(backend: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether such tensors are computed by the Triton kernels.

    'auto' uses the kernels on CUDA if they support the tensors.

    Raises:
        ValueError: 'triton' is requested and not possible.
    """
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return False
    if TRITON_USABLE:
        # Imported here, because a CPU does not need it.
        from infini_kernels.triton.blocks import supports

        if supports(q, k, v):
            return True
    if backend == "auto":
        return False
    raise ValueError(
        f"backend is 'triton', which takes CUDA tensors of float16, bfloat16 or float32 with heads of at most 256, and the "
        f"package triton, 3.4 or later; q is {tuple(q.shape)} {q.dtype} on {q.device}"
        + ("" if TRITON_USABLE else ", and such a triton is not installed")
        + ": write 'auto' or 'reference'"
    )
