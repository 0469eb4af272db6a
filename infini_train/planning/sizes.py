"""Tensor dimensions on one process of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from infini_train.config import RunConfig
from infini_train.parallel.schedule import segment_schedule

FLOAT32 = 4
"""Bytes of a float32 element. Memory states, master weights, moments and gradient sums are float32 in every precision."""


@dataclass(frozen=True)
class InFlight:
    """Largest numbers of objects that a stage keeps at the same time during a step."""

    micro_batches: tuple[int, ...]
    """Micro-batches between forward and backward for each chunk, at the time when their sum over the chunks is largest."""
    states: int
    """Memory states, each of all layers of one chunk, including their gradients."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one process of a validated run on `processes` processes.

    Attributes:
        run: the validated run.
        processes: number of processes in the job.
        kernels: whether the Triton kernels compute the memory, as on GPUs, or PyTorch does, as on CPUs.
    """

    run: RunConfig
    processes: int
    kernels: bool = False

    @property
    def element(self) -> int:
        """Bytes of one element of a weight or an activation."""
        return 2 if self.run.training.precision == "bfloat16" else 4

    @property
    def tp(self) -> int:
        return self.run.layout.tensor_parallel_size

    @property
    def cp(self) -> int:
        return self.run.layout.context_parallel_size

    @property
    def pp(self) -> int:
        return self.run.layout.pipeline_parallel_size

    @property
    def dp(self) -> int:
        return self.run.data_parallel_size(self.processes)

    @property
    def replicas(self) -> int:
        """Number of processes that hold the same weights; they form DeepSpeed's data-parallel group."""
        return self.dp * self.cp

    @property
    def rows(self) -> int:
        """Rows on this process (B)."""
        return self.run.training.rows // self.dp

    @property
    def segments(self) -> int:
        """Segments per row of a micro-batch on this process (N)."""
        return self.run.training.segments_per_micro_batch // self.cp

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on this process, over all of its rows (B T)."""
        return self.rows * self.segments * self.run.model.segment_length

    @property
    def shard_tokens(self) -> int:
        """Tokens of one micro-batch between tensor-parallel layers, where sequence parallelism shards them."""
        return self.tokens // self.tp if self.run.layout.sequence_parallel else self.tokens

    @property
    def heads(self) -> int:
        return self.run.model.num_attention_heads // self.tp

    @property
    def groups(self) -> int:
        return self.run.model.num_query_groups // self.tp

    @property
    def chunk_layers(self) -> int:
        """Layers of one chunk of one stage."""
        return self.run.model.num_layers // self.run.layout.num_virtual_stages

    @property
    def stage_layers(self) -> int:
        """Layers of one stage, over its chunks."""
        return self.run.model.num_layers // self.pp

    @property
    def recomputed_chunk_layers(self) -> int:
        """Layers of one chunk that are recomputed in the backward pass."""
        return self.chunk_layers if self.run.training.recompute == "stage" else self.run.recomputed_layers

    @property
    def recomputed_layers(self) -> int:
        """Layers of one stage, over its chunks, that are recomputed in the backward pass."""
        return self.recomputed_chunk_layers * self.run.layout.virtual_stages

    @property
    def has_memory(self) -> bool:
        return self.run.model.attention == "infini"

    @property
    def state_bytes(self) -> int:
        """Bytes of one layer's memory state on this process: M [B, G, D, Dv], z [B, G, D] and the convolution tail."""
        width, values = self.run.model.head_dim, self.run.model.memory_value_width
        return self.rows * self.groups * width * (values + 1) * FLOAT32 + self.tail_bytes if self.has_memory else 0

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tokens that one layer's convolution carries to the next micro-batch: [B, G, R + 1, W, D]."""
        model = self.run.model
        if model.short_convolution_reach == "segment":
            return 0
        return self.rows * (self.heads + self.groups) * model.short_convolution * model.head_dim * FLOAT32

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """Return whether the chunk has the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int | None = None) -> bool:
        """Return whether the chunk (the last one if None) has the output layer and the loss."""
        last = self.run.layout.virtual_stages - 1
        return stage == self.pp - 1 and (last if chunk is None else chunk) == last

    def in_flight(self, stage: int) -> InFlight:
        """Return the maxima of a stage over its pipeline schedule."""
        training = self.run.training
        return _in_flight(
            self.pp,
            stage,
            self.run.micro_batches_per_step,
            training.micro_batches_per_window,
            self.run.layout.virtual_stages,
        )


@cache
def _in_flight(num_stages: int, stage: int, num_micro_batches: int, window: int, chunks: int) -> InFlight:
    live = [0] * chunks
    states: Counter[tuple[int, int]] = Counter()
    most, most_states = list(live), 0
    for operation in segment_schedule(num_stages, stage, num_micro_batches, window, virtual_stages=chunks):
        index, chunk, gradients = operation.micro_batch, operation.chunk, 0
        # The state that leaves a micro-batch enters the next one.
        both = (chunk, index), (chunk, index + 1)
        if operation.kind == "forward":
            live[chunk] += 1
            states.update(both)
            if sum(live) > sum(most):
                most = list(live)
        else:
            # Gradients of the leaving and the entering state. States at the start and the end of a window have none.
            gradients = (index % window != window - 1 and index != num_micro_batches - 1) + (index % window != 0)
        most_states = max(most_states, len(states) + gradients)
        if operation.kind == "backward":
            live[chunk] -= 1
            for state in both:
                states[state] -= 1
                if not states[state]:
                    del states[state]
    return InFlight(tuple(most), most_states)
