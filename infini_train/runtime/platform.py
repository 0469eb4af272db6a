"""Selection of CUDA or the CPU, and the library settings that each needs.

Megatron-core calls `torch.cuda.current_device()` for the device of its weights and buffers, and DeepSpeed compiles a
shared-memory extension when it starts on a CPU. On a machine without CUDA, `install` makes the first return the CPU and
disables the second. On a machine with CUDA it does not patch these libraries.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import stat
import sys
import tempfile
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from infini_train.runtime.errors import UserError


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def processor() -> str:
    """Return the name of the CPU model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def backend() -> str:
    """Return the torch.distributed backend for this platform."""
    return "nccl" if has_cuda() else "gloo"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: allocated GPU memory, or resident host memory on a CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def install() -> None:
    """Prepare the platform. Call this before importing Megatron-core or DeepSpeed. It is safe to call this twice.

    Raises:
        UserError: this machine has more processes than GPUs.
    """
    _silence_libraries()
    if has_cuda():
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        processes = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if processes > (gpus := torch.cuda.device_count()):
            raise UserError(
                f"{processes} processes were started here, but this machine has {gpus} GPU(s), one for each process; start at "
                f"most {gpus}, or set CUDA_VISIBLE_DEVICES to nothing to run on the CPU"
            )
        torch.cuda.set_device(rank)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            use_local_kernel_cache()
        # Only a few small kernels are compiled. Starting one compile process per core in every rank would take longer.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        # PyTorch runs a convolution with cuDNN, which by default rounds float32 to 10 bits (TF32) and has a gradient that is
        # not deterministic.
        torch.backends.cudnn.allow_tf32 = False
        # This is the default, but the environment may have changed it: the memory's products are float32, not TF32 (10 bits).
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.deterministic = True
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Without LOCAL_SIZE, DeepSpeed's CPU accelerator looks for NUMA tools to count the processes of a host.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Without CUDA the original function raises, so no working program on such a machine depends on it.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    # torch.compile needs a C++ compiler on a CPU, and Megatron-core decorates its fusions with it at import.
    import megatron.core.jit as megatron_jit

    megatron_jit.disable_jit_fuser()

    # Megatron-core forks CUDA's generator around sequence-parallel regions. Without dropout nothing draws from it.
    import megatron.core.tensor_parallel as tensor_parallel

    tensor_parallel.get_cuda_rng_tracker = _NoRandomState

    # Import by name, because the attribute `torch` of the package `deepspeed.comm` is torch itself.
    deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
    # The extension takes two minutes to compile at the first start. If that is interrupted, its lock hangs all later starts.
    deepspeed_torch.build_shm_op = lambda: None  # type: ignore[attr-defined]


def use_local_kernel_cache() -> None:
    """Make Triton cache compiled kernels in this machine's temporary folder instead of the home folder.

    All ranks compile the same kernels at the same time. On clusters the home folder is on a network file system, where this
    can fail with an OSError on one rank (https://github.com/triton-lang/triton/issues/11512).
    """
    folder = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
    if "TRITON_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return
    # Files in this folder are executed, and any user can create a folder with this name.
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        os.environ["TRITON_CACHE_DIR"] = str(folder)


def set_deterministic(wanted: bool) -> None:
    """Require deterministic algorithms on CUDA, or allow all. On a CPU all operations used here are deterministic.

    Args:
        wanted: True to require deterministic algorithms.
    """
    if not has_cuda():
        return
    if wanted and torch.__version__ < "2.11":
        # Older versions require this variable. Newer ones do not, and if it is set they parse it at every matrix product: 70 µs
        # of host time instead of 20 (H200, torch 2.11). They use one workspace per stream, which is enough for equal bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # No code reads uninitialised memory, and filling every new tensor takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _NoRandomState:
    """Replacement for Megatron-core's tracker of CUDA random states that does nothing."""

    def fork(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()


def _silence_libraries() -> None:
    """Suppress start-up warnings of the libraries. Their errors are still shown."""
    for pattern in (
        ".*Apex is not installed.*",
        ".*Transformer Engine.*",
        ".*full scope is deprecated.*",
        ".*barrier.*using the device under current context.*",  # `install` sets that device
        ".*Profiler clears events at the end of each cycle.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRITON_PRINT_AUTOTUNING", "0")
    for name in ("DeepSpeed", "deepspeed", "megatron", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
