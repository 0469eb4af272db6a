"""Estimate of the step time from FLOPs, bytes and assumed fractions of the data-sheet rates.

Each assumption is a constant in this file, with its source. Comparison with measured steps (benchmarks/results/step.jsonl;
fused layers, deterministic, linear rule):

    model                     GPU   planned  measured
    slice of 8B with 4 layers H100  0.401 s  0.452 s
    slice of 8B with 4 layers H200  0.380 s  0.400 s
    1B                        H200  0.481 s  0.482 s
"""

from __future__ import annotations

from dataclasses import dataclass

from infini_train.model.flops import core_flops_per_token, linear_parameters, output_matrix_parameters, training_flops_per_token
from infini_train.parallel.schedule import pipeline_bubble
from infini_train.planning import activations
from infini_train.planning.communication import Traffic, stage_traffic
from infini_train.planning.parameter_counts import count, stage_parameters
from infini_train.planning.sizes import FLOAT32, Sizes
from infini_train.runtime.hardware import Gpu

MATMUL_SHARE = 0.70
"""Fraction of the peak that large matrix products reach. FlashAttention-3 (arXiv 2407.08608, section 1) reports 80 to 90% for
optimised products on Hopper. The products of a layer are smaller and run between other kernels."""
ATTENTION_SHARE = {"A100": 0.50, "H100": 0.35, "H200": 0.35}
"""Fraction of the peak that FlashAttention-2 reaches, forward and backward: 50 to 73% on A100 (arXiv 2307.08691, abstract),
35% on H100 (arXiv 2407.08608, abstract)."""
MEMORY_SHARE = 0.50
"""Fraction of the float32 peak that the products of the compressive memory reach. This is a conservative value. With bfloat16
tokens, the kernels of one layer of 8B took 1.5 ms (linear) and 1.9 ms (delta) for 32,768 tokens on an H100. That time
corresponds to 1.2 to 1.3 times the float32 peak. Other types were not measured."""
BANDWIDTH_SHARE = 0.80
"""Fraction of the GPU memory bandwidth that passes over tensors reach. STREAM-like copies reach 80 to 90% (a rule of thumb, no
source)."""
TRAFFIC_PER_KEPT_BYTE = 6.0
"""Passes over GPU memory for each saved byte of activations: written and read in the forward pass, read in the backward pass,
gradient written and read, and one pass for temporaries. A guess, no source."""
LINK_SHARE = {"NVLink": 0.75, "network": 0.80}
"""Fraction of a link's bandwidth that collectives reach. NCCL's tests report bus bandwidths of this order for messages of many
megabytes (defined in https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)."""
MESSAGE_SECONDS = {"NVLink": 15e-6, "network": 30e-6}
"""Latency of a message in seconds, independent of its size. A guess for NCCL, no source."""
HOST_SECONDS = 6e-3
"""Seconds that the host needs to launch the kernels of one layer for one micro-batch, forward and backward. The number of
tokens does not matter. A profile of a step of 1B showed 3.2 ms (forward) and 2.8 ms (backward): medians with PyTorch's
profiler overhead on the host of an H200, commit 6699f28, not recorded in benchmarks/results/. Hosts differed by 40%."""
OPTIMIZER_BYTES = 28
"""Bytes that fused Adam moves per parameter: it reads the float32 gradient, weight and two moments, and writes the weight and
moments."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage."""

    stage: int
    device: float
    """GPU time of all micro-batches: matrix products, attention, compressive memory, passes over tensors, and recomputation."""
    host: float
    """Host time to launch the kernels of all micro-batches, in parallel with the GPU."""
    communication: float
    """Messages of all micro-batches over tensor, context and pipeline groups, assuming no overlap with computation."""
    bubble: float
    """Idle time while waiting for other stages."""
    data: float
    """Reducing gradients and gathering weights over the data-parallel group."""
    optimizer: float

    @property
    def compute(self) -> float:
        """Return the larger of GPU time and host time, which run in parallel."""
        return max(self.device, self.host)

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.data + self.optimizer


def traffic_seconds(item: Traffic, gpu: Gpu) -> float:
    """Return the seconds that all messages of `item` take in one step.

    A ring over several nodes enters and leaves each node once, over the network adapters of all group members on the node.
    """
    link = item.link(gpu.gpus_per_node)
    bandwidth = gpu.nvlink_bandwidth
    if link == "network":
        adapters = 1 if item.operation == "send" else item.per_node(gpu.gpus_per_node)
        bandwidth = min(bandwidth, adapters * gpu.network_bandwidth)
    return item.wire_bytes / (bandwidth * LINK_SHARE[link]) + item.messages * MESSAGE_SECONDS[link]


def stage_compute_seconds(sizes: Sizes, stage: int, gpu: Gpu) -> float:
    """Return the GPU seconds of one micro-batch on one process of a stage, forward and backward."""
    run, layers, forward_passes = sizes.run, sizes.stage_layers, _forward_passes(sizes)
    peak = gpu.peak(run.training.precision)
    per_layer = 2.0 * (linear_parameters(run) - output_matrix_parameters(run)) / run.model.num_layers
    products = layers * per_layer * forward_passes
    if sizes.is_last(stage):
        again = forward_passes if run.training.recompute == "stage" else 3
        products += 2.0 * output_matrix_parameters(run) * (again + activations.chunks_loss(sizes))
    attention, memory = core_flops_per_token(run)
    seconds = products / (peak * MATMUL_SHARE)
    seconds += layers * attention * forward_passes / (peak * ATTENTION_SHARE[gpu.cuda_name])
    seconds += layers * memory * forward_passes / (gpu.float32_flops * MEMORY_SHARE)
    seconds *= sizes.tokens / sizes.tp
    kept = layers * activations.layer_bytes(sizes) + (activations.output_bytes(sizes) if sizes.is_last(stage) else 0)
    passes = TRAFFIC_PER_KEPT_BYTE * forward_passes / 3
    return seconds + kept * passes / (gpu.memory_bandwidth * BANDWIDTH_SHARE)


def stage_host_seconds(sizes: Sizes) -> float:
    """Return the host seconds to launch one micro-batch on one process of a stage, forward and backward."""
    return sizes.stage_layers * HOST_SECONDS * _forward_passes(sizes) / 3


def _forward_passes(sizes: Sizes) -> float:
    """Return the cost of the layers' forward and backward pass, in forward passes.

    A backward pass counts as two forward passes, and full recomputation as one more.
    """
    return 3 + sizes.recomputed_layers / sizes.stage_layers


def step_time(sizes: Sizes, gpu: Gpu) -> StepTime:
    """Return the step time of the slowest stage."""
    return max((_stage_time(sizes, stage, gpu) for stage in range(sizes.pp)), key=lambda time: time.total)


def _stage_time(sizes: Sizes, stage: int, gpu: Gpu) -> StepTime:
    run, layout = sizes.run, sizes.run.layout
    micro_batches = run.micro_batches_per_step
    traffic = stage_traffic(sizes, stage)
    device, host = micro_batches * stage_compute_seconds(sizes, stage, gpu), micro_batches * stage_host_seconds(sizes)
    inside = sum(traffic_seconds(item, gpu) for item in traffic if item.kind != "data")
    data = sum(traffic_seconds(item, gpu) for item in traffic if item.kind == "data")
    idle = pipeline_bubble(layout.pipeline_parallel_size, micro_batches, virtual_stages=layout.virtual_stages)
    number = count(stage_parameters(sizes, stage))
    stepped = number / (sizes.replicas if layout.zero_stage else 1)
    # In addition to Adam: the norm reads the gradients, clipping reads and writes them, and zeroing writes them.
    step_bytes = stepped * OPTIMIZER_BYTES + 4 * FLOAT32 * number
    return StepTime(
        stage=stage,
        device=device,
        host=host,
        communication=inside,
        bubble=(max(device, host) + inside) * idle / (1 - idle),
        data=data,
        optimizer=step_bytes / (gpu.memory_bandwidth * BANDWIDTH_SHARE),
    )


def model_flops_utilization(sizes: Sizes, gpu: Gpu, seconds: float) -> float:
    """Return the MFU of a step, with the convention of `infini_train.model.flops` and metrics.jsonl.

    The denominator is the bfloat16 peak for every precision.

    Args:
        seconds: duration of one step.
    """
    flops = training_flops_per_token(sizes.run) * sizes.run.tokens_per_step
    return flops / (seconds * gpu.bfloat16_flops * sizes.processes)
