"""Runs the segment schedule on one stage: memory from micro-batch to micro-batch, hidden states from stage to stage.

Shapes: B rows of this process, T tokens of a row's micro-batch, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from infini_train import platform
from infini_train.attention import LayerMemory
from infini_train.config import RunConfig
from infini_train.data.streams import StreamBatch
from infini_train.model.gpt import DTYPES
from infini_train.model.micro_batch import Memory, MicroBatch
from infini_train.parallel.engine import Engine, InferenceEngine
from infini_train.parallel.layout import Layout
from infini_train.parallel.schedule import segment_schedule
from infini_train.parallel.transport import StageTransport


@dataclass
class _Live:
    """A micro-batch between its forward and its backward."""

    batch: StreamBatch
    hidden_in: Tensor | None
    memory_in: Memory
    output: Tensor | None = None
    """Hidden states [T, B, h], or the scaled loss (a scalar) on the last stage; None if the backward computes it again."""
    memory_out: Memory | None = None


class SegmentPipeline:
    """One stage of the pipeline; with one stage, the whole model under the same code.

    Args:
        engine: the stage's layers.
        layout: who this process is.
        rows: rows of this process.
    """

    def __init__(self, engine: Engine | InferenceEngine, run: RunConfig, layout: Layout, rows: int) -> None:
        self.engine = engine
        self.run = run
        self.layout = layout
        self.device = platform.device()
        tokens = run.micro_batch_tokens // layout.cp_size
        if run.layout.sequence_parallel:
            tokens //= layout.tp_size
        shape = (tokens, rows, run.model.hidden_size)
        self.context_group = parallel_state.get_context_parallel_group() if layout.cp_size > 1 else None
        self.transport = StageTransport(shape, DTYPES[run.training.precision], self.device)

    def train_step(self, batches: Sequence[StreamBatch], memory: Memory, loss_scale: float) -> tuple[float, Memory]:
        """Forward and backward of all micro-batches of a step; gradients stay in the engine.

        Args:
            batches: the step's micro-batches in stream order, a whole number of windows.
            memory: memory that enters the first; gradients stop there.
            loss_scale: factor on the summed token losses before back-propagation.

        Returns:
            Summed loss over the valid tokens of this process's rows in nats (0 before the last stage), and the memory that
            leaves.
        """
        window = self.run.training.micro_batches_per_window
        recompute = self.run.training.recompute == "stage"
        live: dict[int, _Live] = {}
        memory_gradients: dict[int, dict[int, LayerMemory]] = {}
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for operation in segment_schedule(self.layout.pp_size, self.layout.pp_rank, len(batches), window):
            index = operation.micro_batch
            if operation.kind == "forward":
                entering = _entering(memory, window_start=index % window == 0)
                hidden = self.transport.receive_forward()
                if hidden is not None:
                    hidden.requires_grad_()
                current = live[index] = _Live(batches[index], hidden, entering)
                with torch.set_grad_enabled(not recompute):
                    output, memory, loss = self._forward(batches[index], hidden, entering)
                loss_sum += loss.detach().double()
                if not self.layout.is_last_stage:
                    self.transport.send_forward(output)
                if not recompute:
                    current.output = loss * loss_scale if self.layout.is_last_stage else output
                    current.memory_out = memory
            else:
                current = live.pop(index)
                gradient = self.transport.receive_backward()
                if recompute:
                    output, current.memory_out, loss = self._forward(current.batch, current.hidden_in, current.memory_in)
                    current.output = loss * loss_scale if self.layout.is_last_stage else output
                memory_gradients[index - 1] = self._backward(current, gradient, memory_gradients.pop(index, {}))
        self.transport.wait_sends()
        return float(loss_sum), detach_memory(memory)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Sequence[StreamBatch],
        memory: Memory,
        on_losses: Callable[[StreamBatch, Tensor], None],
        *,
        empty_memory: bool = False,
    ) -> Memory:
        """Forward only.

        Args:
            memory: memory that enters the first micro-batch.
            on_losses: called on the last stage with each micro-batch and its token losses [B, T] (nats).
            empty_memory: reset the memory at every segment, to see what it is worth.

        Returns:
            The memory that leaves.
        """
        for batch in batches:
            output, memory, _ = self._forward(batch, self.transport.receive_forward(), memory, empty_memory=empty_memory)
            if self.layout.is_last_stage:
                on_losses(batch, output)
            else:
                self.transport.send_forward(output)
        self.transport.wait_sends()
        return memory

    def _forward(
        self, batch: StreamBatch, hidden: Tensor | None, memory: Memory, *, empty_memory: bool = False
    ) -> tuple[Tensor, Memory, Tensor]:
        """Output of the stage (token losses [B, T] on the last), memory that leaves, and the summed loss of valid tokens."""
        reset = torch.ones_like(batch.reset) if empty_memory else batch.reset
        # Lengths and resets stay on the host: the attention decides there what it can leave out.
        micro_batch = MicroBatch(reset=reset, lengths=batch.lengths, memory_in=dict(memory), cp_group=self.context_group)
        if hidden is not None:
            self.engine.module.set_input_tensor(hidden)
        labels = batch.targets.to(self.device) if self.layout.is_last_stage else None
        output = self.engine.forward(
            input_ids=batch.tokens.to(self.device),
            position_ids=None,
            attention_mask=None,
            labels=labels,
            packed_seq_params=micro_batch,
        )
        if not self.layout.is_last_stage:
            return output, micro_batch.memory_out, output.new_zeros(())
        loss = (output.float() * batch.loss_mask.to(self.device)).sum()
        return output, micro_batch.memory_out, loss

    def _backward(
        self, live: _Live, gradient: Tensor | None, memory_gradients: dict[int, LayerMemory]
    ) -> dict[int, LayerMemory]:
        """Back-propagate one micro-batch; returns the gradients of the memory that entered it, by layer."""
        assert live.output is not None and live.memory_out is not None
        outputs = [live.output]
        gradients = [torch.ones_like(live.output) if gradient is None else gradient]
        for layer, leaving in memory_gradients.items():
            outputs += [live.memory_out[layer].M, live.memory_out[layer].z]
            gradients += [leaving.M, leaving.z]
        assert isinstance(self.engine, Engine), "an inference engine has no backward"
        self.engine.backward(outputs, gradients)
        if live.hidden_in is not None:
            assert live.hidden_in.grad is not None
            self.transport.send_backward(live.hidden_in.grad)
        return {
            layer: LayerMemory(*(torch.zeros_like(part) if part.grad is None else part.grad for part in (state.M, state.z)))
            for layer, state in live.memory_in.items()
            if state.M.requires_grad
        }


def _entering(memory: Memory, *, window_start: bool) -> Memory:
    """Memory as leaves of a micro-batch's graph; gradients stop at a window's start."""
    return {
        layer: LayerMemory(*(part.detach().requires_grad_(not window_start) for part in (state.M, state.z)))
        for layer, state in memory.items()
    }


def detach_memory(memory: Memory) -> Memory:
    """The same memory without its graph."""
    return {layer: LayerMemory(state.M.detach(), state.z.detach()) for layer, state in memory.items()}
