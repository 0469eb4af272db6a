"""How long a step takes, from FLOPs, bytes and a few assumed shares of what a data sheet promises.

Every assumption is a constant of this file with its source. Against measured steps (benchmarks/results/step.jsonl; fused
layers, same bits twice, linear rule): a slice of 8B, 4 layers, 0.401 s planned and 0.452 measured on an H100, 0.380 and 0.400
on an H200; 1B on an H200 0.481 and 0.482.
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
"""Share of the peak that large matrix products reach. FlashAttention-3 (arXiv 2407.08608, section 1) puts optimised products on
Hopper at 80 to 90%; the layers' products are smaller and run between other kernels."""
ATTENTION_SHARE = {"A100": 0.50, "H100": 0.35, "H200": 0.35}
"""Share of the peak of FlashAttention-2, forward and backward: 50 to 73% on A100 (arXiv 2307.08691, abstract), 35% on H100
(arXiv 2407.08608, abstract)."""
MEMORY_SHARE = 0.50
"""Share of the float32 peak that the memory's products reach. Cautious: with bfloat16 tokens the kernels of one layer of 8B
took 1.5 (linear) and 1.9 ms (delta) for 32,768 tokens on an H100, as products at 1.2 to 1.3 of that peak would.
Other types were not measured."""
BANDWIDTH_SHARE = 0.80
"""Share of the memory bandwidth of passes over tensors. STREAM-like copies reach 80 to 90% (a rule of thumb, no source)."""
TRAFFIC_PER_KEPT_BYTE = 6.0
"""Passes over memory for each byte of activations: written and read in the forward, read in the backward, its gradient written
and read, and one more for what is never kept. A guess: no source."""
LINK_SHARE = {"NVLink": 0.75, "network": 0.80}
"""Share of a link's bandwidth that collectives reach (NCCL's tests report bus bandwidths of this order for messages of many
megabytes; https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md says how that number is defined)."""
MESSAGE_SECONDS = {"NVLink": 15e-6, "network": 30e-6}
"""Time of a message however small. A guess at NCCL's latency: no source."""
HOST_SECONDS = 6e-3
"""Time that the host takes to launch a layer's kernels for one micro-batch, forward and backward, however few tokens it has. In
the profile of a step of 1B it took 3.2 and 2.8 ms (medians, PyTorch's profiler included; an H200's host, commit 6699f28, in no
record). Hosts were seen to differ by 40%."""
OPTIMIZER_BYTES = 28
"""Bytes that a fused Adam reads and writes for each number that it steps: float32 gradient, weight and two moments read, the
last three written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the stage that holds up the others."""

    stage: int
    device: float
    """Matrix products, attention, memory and passes over tensors, recomputation included, of all micro-batches."""
    host: float
    """Launching all that, beside the GPU's work."""
    communication: float
    """Over tensor, context and pipeline groups, of all micro-batches; nothing overlaps with computation."""
    bubble: float
    """Waiting for other stages."""
    data: float
    """Reducing gradients and gathering weights."""
    optimizer: float

    @property
    def compute(self) -> float:
        """Whichever of the two is slower holds up the other."""
        return max(self.device, self.host)

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.data + self.optimizer


def traffic_seconds(item: Traffic, gpu: Gpu) -> float:
    """Time of a kind of message in one step.

    A ring over several nodes enters and leaves a node once, over the adapters of all its members there.
    """
    link = item.link(gpu.gpus_per_node)
    bandwidth = gpu.nvlink_bandwidth
    if link == "network":
        adapters = 1 if item.operation == "send" else item.per_node(gpu.gpus_per_node)
        bandwidth = min(bandwidth, adapters * gpu.network_bandwidth)
    return item.wire_bytes / (bandwidth * LINK_SHARE[link]) + item.messages * MESSAGE_SECONDS[link]


def stage_compute_seconds(sizes: Sizes, stage: int, gpu: Gpu) -> float:
    """Computation of one micro-batch on one process of a stage, forward and backward."""
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
    """Launching one micro-batch on one process of a stage, forward and backward."""
    return sizes.stage_layers * HOST_SECONDS * _forward_passes(sizes) / 3


def _forward_passes(sizes: Sizes) -> float:
    """What forward and backward of the layers cost, in forward passes: a backward is two, and recomputation is one more."""
    return 3 + sizes.recomputed_layers / sizes.stage_layers


def step_time(sizes: Sizes, gpu: Gpu) -> StepTime:
    """The slowest stage's step."""
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
    # Beside Adam: the norm reads the gradients, clipping reads and writes them, and they are set to zero.
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
    """MFU of a step that takes so long: the convention of `infini_train.model.flops`, which metrics.jsonl reports too.

    The denominator is the bfloat16 peak whatever the precision, as there.
    """
    flops = training_flops_per_token(sizes.run) * sizes.run.tokens_per_step
    return flops / (seconds * gpu.bfloat16_flops * sizes.processes)
