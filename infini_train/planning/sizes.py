"""The shapes that one process of a run works with."""

from __future__ import annotations

from dataclasses import dataclass

from infini_train.config import RunConfig
from infini_train.parallel.schedule import segment_schedule

FLOAT32 = 4
"""Bytes of a number in memory, master weights, moments and gradient sums, whatever the precision."""


@dataclass(frozen=True)
class InFlight:
    """The most that a stage keeps at one time during a step."""

    micro_batches: list[int]
    """For each of its chunks, those between forward and backward, when they are most over all chunks."""
    states: int
    """Memories of one chunk's layers, with their gradients."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one process of a validated run on `processes` processes."""

    run: RunConfig
    processes: int

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
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
        """Processes that hold the same weights: DeepSpeed's data-parallel group."""
        return self.dp * self.cp

    @property
    def rows(self) -> int:
        """Rows of this process (B)."""
        return self.run.training.rows // self.dp

    @property
    def segments(self) -> int:
        """Segments of a row's micro-batch on this process (N)."""
        return self.run.training.segments_per_micro_batch // self.cp

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on this process, over all of its rows (B T)."""
        return self.rows * self.segments * self.run.model.segment_length

    @property
    def shard_tokens(self) -> int:
        """The same between tensor-parallel layers, where sequence parallelism splits them."""
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
    def has_memory(self) -> bool:
        return self.run.model.attention == "infini"

    @property
    def state_bytes(self) -> int:
        """Bytes of one layer's M [B, G, D, D] and z [B, G, D] on this process."""
        width = self.run.model.head_dim
        return self.rows * self.groups * (width * width + width) * FLOAT32 if self.has_memory else 0

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """Whether the chunk embeds tokens."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int | None = None) -> bool:
        """Whether the chunk (the last one if None) has the output layer and the loss."""
        last = self.run.layout.virtual_stages - 1
        return stage == self.pp - 1 and (last if chunk is None else chunk) == last

    def in_flight(self, stage: int) -> InFlight:
        """What a stage keeps, counted along the schedule itself."""
        layout, window = self.run.layout, self.run.training.micro_batches_per_window
        live: list[set[int]] = [set() for _ in range(layout.virtual_stages)]
        most, most_states = [0], 0
        operations = segment_schedule(
            self.pp, stage, self.run.micro_batches_per_step, window, virtual_stages=layout.virtual_stages
        )
        last = self.run.micro_batches_per_step - 1
        for operation in operations:
            index, gradients = operation.micro_batch, 0
            if operation.kind == "forward":
                live[operation.chunk].add(index)
                if sum(map(len, live)) > sum(most):
                    most = [len(each) for each in live]
            else:
                # Of the memory that left this micro-batch, and of what entered it: a window's ends have none.
                gradients = (index % window != window - 1 and index != last) + (index % window != 0)
            # What leaves one micro-batch enters the next.
            states = sum(len(each | {number + 1 for number in each}) for each in live)
            most_states = max(most_states, states + gradients)
            if operation.kind == "backward":
                live[operation.chunk].remove(index)
        return InFlight(most, most_states)
