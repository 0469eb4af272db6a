"""CUDA or CPU, decided once.

Megatron-core asks `torch.cuda.current_device()` for the device of its weights and buffers, and DeepSpeed compiles a
shared-memory extension when it starts on a CPU. Where there is no CUDA, `install` makes the first mean the CPU and keeps the
second off; where there is, it changes nothing.
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
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def backend() -> str:
    """The torch.distributed backend for this platform."""
    return "nccl" if has_cuda() else "gloo"


def peak_memory() -> int:
    """Most bytes that this process held so far: of its GPU's allocator, or of everything on a CPU."""
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
        # What is compiled here are a few small kernels: less work than to start a process for each core, in every rank.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        # For a convolution that PyTorch gives to cuDNN: by default float32 is rounded to 10 bits, and its gradient need not
        # have the same bits twice.
        torch.backends.cudnn.allow_tf32 = False
        # The default, which an environment may have changed: the memory's products are float32, not rounded to 10 bits.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.deterministic = True
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed's CPU accelerator looks for NUMA tools when it is not told how many processes a host has.
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
    # Two minutes of compilation at the first start, and a lock that hangs every later start if it is interrupted.
    deepspeed_torch.build_shm_op = lambda: None  # type: ignore[attr-defined]


def cache_kernels_on_this_machine() -> None:
    """Let Triton keep compiled kernels in the folder for temporary files instead of the home folder.

    All ranks compile the same kernels in the same moment. Homes of clusters are on network file systems, where that can end
    in an OSError of one rank (https://github.com/triton-lang/triton/issues/11512).
    """
    folder = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
    if "TRITON_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return
    # What lies there is executed, and everybody can make a folder of this name.
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        os.environ["TRITON_CACHE_DIR"] = str(folder)


def set_deterministic(wanted: bool) -> None:
    """Take only operations whose result has the same bits twice, or any. On a CPU all have."""
    if not has_cuda():
        return
    if wanted and torch.__version__ < "2.11":
        # Older versions ask for it. Newer ones do not, and with it they parse it at every matrix product: 70 µs of the host
        # instead of 20 (H200, torch 2.11). Each stream has a workspace of its own, which is all that equal bits need.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # All that is read was written, and filling every new tensor takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _NoRandomState:
    """Stands in for Megatron-core's tracker of CUDA random states."""

    def fork(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()


def _quiet_libraries() -> None:
    """Keep start-up chatter of the libraries off the screen; their errors stay."""
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
