"""CUDA or CPU, decided once.

Megatron-core asks `torch.cuda.current_device()` for the device of its weights and buffers, and DeepSpeed compiles a
shared-memory extension when it starts on a CPU. Without CUDA, `install` makes the first mean the CPU and turns the
second off. With CUDA it changes neither.
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
    """Return the CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def backend() -> str:
    """Return the torch.distributed backend of this platform."""
    return "nccl" if has_cuda() else "gloo"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU's allocator, or of the process on a CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def install() -> None:
    """Prepare the platform; call before Megatron-core or DeepSpeed is imported. Safe to call twice.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    _quiet_libraries()
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
            cache_kernels_on_this_machine()
        # Only a few small kernels are compiled: less work than starting a compile process per core in every rank.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        # For cuDNN's convolution: by default it rounds float32 to 10 bits, and its gradient is not deterministic.
        torch.backends.cudnn.allow_tf32 = False
        # The default, which an environment variable may have changed: float32 products of the memory without rounding.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.deterministic = True
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed's CPU accelerator searches NUMA tools if the number of processes per host is not set.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Without CUDA the original raises, so no working program on such a machine depends on it.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    # torch.compile needs a C++ compiler on a CPU; Megatron-core decorates its fusions with it at import.
    import megatron.core.jit as megatron_jit

    megatron_jit.disable_jit_fuser()

    # Megatron-core forks CUDA's generator around sequence-parallel regions; without dropout nothing draws from it.
    import megatron.core.tensor_parallel as tensor_parallel

    tensor_parallel.get_cuda_rng_tracker = _NoRandomState

    # By name: the package `deepspeed.comm` has an attribute `torch` that is torch itself.
    deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
    # It compiles for two minutes at the first start. If interrupted, its lock hangs every later start.
    deepspeed_torch.build_shm_op = lambda: None  # type: ignore[attr-defined]


def cache_kernels_on_this_machine() -> None:
    """Let Triton keep compiled kernels in the folder for temporary files instead of the home folder.

    All ranks compile the same kernels at the same time. If the home folder is on a network file system, this can raise an
    OSError in one rank (https://github.com/triton-lang/triton/issues/11512).
    """
    folder = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
    if "TRITON_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return
    # Files in the folder are executed, and any user can create a folder of this name.
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        os.environ["TRITON_CACHE_DIR"] = str(folder)


def set_deterministic(wanted: bool) -> None:
    """Allow only deterministic operations, or all. On a CPU all are deterministic."""
    if not has_cuda():
        return
    if wanted and torch.__version__ < "2.11":
        # Older versions ask for it. Newer ones do not, and with it they parse it at every matrix product: 70 µs of the host
        # instead of 20 (H200, torch 2.11). Each stream has a workspace of its own, which is all that equal bits need.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Filling every new tensor takes time, and every value that is read was written before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _NoRandomState:
    """Replacement of Megatron-core's tracker of CUDA random states."""

    def fork(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()


def _quiet_libraries() -> None:
    """Hide start-up messages of the libraries, but not their errors."""
    for pattern in (
        ".*Apex is not installed.*",
        ".*Transformer Engine.*",
        ".*full scope is deprecated.*",
        ".*barrier.*using the device under current context.*",  # which `install` has set
        ".*Profiler clears events at the end of each cycle.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRITON_PRINT_AUTOTUNING", "0")
    for name in ("DeepSpeed", "deepspeed", "megatron", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
