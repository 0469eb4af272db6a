"""Known GPUs, from the vendor's data sheets. This module does not import torch, so that planning starts fast.

Sources (figures without sparsity; NVLink is one direction, half of the total in the data sheet):
    A100  https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    H100  https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    H200  https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
    Network between nodes: one adapter a GPU, as in DGX A100 (8 × 200 Gb/s InfiniBand) and DGX H100 / H200 (8 × 400 Gb/s).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from infini_train.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU model and the interconnect of the nodes that usually contain it."""

    name: str
    """Name in `infini-train plan` and in `GPUS`."""
    cuda_name: str
    """Substring of the device name that CUDA reports."""
    memory: float
    """Bytes; the data sheet's gigabytes are taken as 10^9 bytes."""
    bfloat16_flops: float
    """Dense tensor-core peak in FLOP/s."""
    float32_flops: float
    """Peak in FLOP/s without tensor cores, because training keeps TF32 off."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second from one GPU to the others of its node, one direction."""
    network_bandwidth: float
    """Bytes per second of one GPU's network adapter, one direction."""
    gpus_per_node: int = 8

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s of matrix products in the given `training.precision`."""
        return self.bfloat16_flops if precision == "bfloat16" else self.float32_flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-40gb",
            cuda_name="A100",
            memory=40e9,
            bfloat16_flops=312e12,
            float32_flops=19.5e12,
            memory_bandwidth=1.555e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(
            name="a100-80gb",
            cuda_name="A100",
            memory=80e9,
            bfloat16_flops=312e12,
            float32_flops=19.5e12,
            memory_bandwidth=2.039e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(
            name="h100-80gb",
            cuda_name="H100",
            memory=80e9,
            bfloat16_flops=989e12,
            float32_flops=67e12,
            memory_bandwidth=3.35e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Gpu(
            name="h200-141gb",
            cuda_name="H200",
            memory=141e9,
            bfloat16_flops=989e12,
            float32_flops=67e12,
            memory_bandwidth=4.8e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
    )
}

_OTHER_PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H200 NVL": 835e12}
"""bfloat16 peak in FLOP/s of variants that differ from `GPUS`, by CUDA's device name. Planning does not offer them."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name in `GPUS`.

    Raises:
        UserError: the name is not in `GPUS`.
    """
    try:
        return GPUS[name]
    except KeyError:
        raise UserError(f"gpu {name!r} is not known; known are {', '.join(GPUS)}") from None


def bfloat16_peak(cuda_name: str) -> float | None:
    """Return the dense bfloat16 peak in FLOP/s of the device with this CUDA name; None if it is not known."""
    for name, peak in [*_OTHER_PEAKS.items(), *((gpu.cuda_name, gpu.bfloat16_flops) for gpu in GPUS.values())]:
        if re.search(rf"{name}(?!\d)", cuda_name):  # "A100" must not match an RTX A1000
            return peak
    return None
