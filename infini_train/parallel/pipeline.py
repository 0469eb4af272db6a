"""Execution of the segment schedule on one pipeline stage.

It passes memory from micro-batch to micro-batch and hidden states from stage to stage.

Shapes: B rows of this rank, T tokens of a row's micro-batch, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from infini_kernels.segments import to_device
from infini_train.attention import LayerMemory, detached, map_tensors, without_tail
from infini_train.config import RunConfig
from infini_train.data.streams import Batch
from infini_train.model.gpt import DTYPES
from infini_train.model.layer_context import LayerContext, Memory
from infini_train.parallel.deepspeed.engine import Engine, InferenceEngine
from infini_train.parallel.layout import Layout
from infini_train.parallel.schedule import Operation, segment_schedule
from infini_train.parallel.transport import StageTransport
from infini_train.runtime import platform
from infini_train.runtime.activity import Activity


@dataclass
class _Live:
    """A micro-batch between its forward and its backward."""

    batch: Batch
    hidden_in: Tensor | None
    memory_in: Memory
    output: Tensor | None = None
    """Hidden states [T, B, h], or the scaled loss (a scalar) of the last chunk; None if the backward recomputes it."""
    memory_out: Memory | None = None


class SegmentPipeline:
    """One stage of the pipeline. With one stage, the same code runs the whole model.

    Args:
        engine: the stage's layers.
        run: the run's configuration.
        layout: ranks and group sizes of this process.
        rows: rows of this rank.
    """

    def __init__(self, engine: Engine | InferenceEngine, run: RunConfig, layout: Layout, rows: int) -> None:
        self.engine = engine
        self.run = run
        self.layout = layout
        self.activity = Activity("starting")
        """Operation in progress. A watchdog replaces this object by its own."""
        self.device = platform.device()
        tokens = run.micro_batch_tokens // layout.cp_size
        if run.layout.sequence_parallel:
            tokens //= layout.tp_size
        shape = (tokens, rows, run.model.hidden_size)
        self.context_group = parallel_state.get_context_parallel_group() if layout.cp_size > 1 else None
        self.transport = StageTransport(shape, DTYPES[run.training.precision], self.device, layout.virtual_stages)
        self.last_chunk = layout.virtual_stages - 1 if layout.is_last_stage else None
        """Index of the chunk whose output is the loss; None if this stage does not have it."""
        self._memory_gradient_norms: dict[int, list[Tensor]] = {}
        self.chunk_layers = [
            {layer.layer_number for layer in engine.module.layers(chunk)} for chunk in range(layout.virtual_stages)
        ]

    def forward_backward(self, batches: Sequence[Batch], memory: Memory, loss_scale: float) -> tuple[Tensor, Memory]:
        """Run forward and backward of all micro-batches of a step. Gradients stay in the engine.

        Args:
            batches: the step's micro-batches in stream order, a whole number of windows.
            memory: memory before the first micro-batch; gradients stop there.
            loss_scale: factor on the summed token losses before back-propagation.

        Returns:
            The weighted sum of the token losses of this rank's rows, in nats (0 before the last stage), and the memory after
            the last micro-batch. The loss stays on the device, because reading it waits for all queued work.
        """
        window = self.run.training.micro_batches_per_window
        recompute = self.run.training.recompute == "stage"
        memory = dict(memory)
        self._memory_gradient_norms = {}
        live: dict[tuple[int, int], _Live] = {}
        memory_gradients: dict[tuple[int, int], dict[int, LayerMemory]] = {}
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for operation in self._schedule(len(batches), window):
            index, chunk = operation.micro_batch, operation.chunk
            is_last = chunk == self.last_chunk
            named = f"micro-batch {index + 1} of {len(batches)}"
            if operation.kind == "forward":
                entering = _entering(self._of_chunk(memory, chunk), window_start=index % window == 0)
                self.activity.begin(f"receive of the hidden states of {named}", waits=True)
                hidden = self.transport.receive_forward(chunk)
                self.activity.begin(f"forward of {named}")
                if hidden is not None:
                    hidden.requires_grad_()
                current = live[chunk, index] = _Live(batches[index], hidden, entering)
                with torch.set_grad_enabled(not recompute):
                    output, leaving, loss = self._forward(batches[index], chunk, hidden, entering)
                memory.update(leaving)
                loss_sum += loss.detach().double()
                self.transport.send_forward(output, chunk)
                if not recompute:
                    current.output = loss * loss_scale if is_last else output
                    current.memory_out = leaving
            else:
                current = live.pop((chunk, index))
                self.activity.begin(f"receive of the gradient of {named}", waits=True)
                gradient = self.transport.receive_backward(chunk)
                self.activity.begin(f"backward of {named}")
                if recompute:
                    output, current.memory_out, loss = self._forward(current.batch, chunk, current.hidden_in, current.memory_in)
                    current.output = loss * loss_scale if is_last else output
                entered = self._backward(current, gradient, memory_gradients.pop((chunk, index), {}))
                memory_gradients[chunk, index - 1] = entered
                self._record_memory_gradient_norms(entered)
                if current.hidden_in is not None:
                    assert current.hidden_in.grad is not None
                    self.transport.send_backward(current.hidden_in.grad, chunk)
        self.activity.begin("sends to neighbouring stages", waits=True)
        self.transport.wait_sends()
        return loss_sum, detach_memory(memory)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Sequence[Batch],
        memory: Memory,
        on_losses: Callable[[Batch, Tensor], None],
        *,
        empty_memory: bool = False,
    ) -> Memory:
        """Run the forward only and report token losses.

        Args:
            batches: micro-batches in stream order.
            memory: memory before the first micro-batch.
            on_losses: called on the last stage with each micro-batch and its token losses [B, T] (nats).
            empty_memory: reset the memory at every segment, to measure its contribution.

        Returns:
            The memory after the last micro-batch.
        """
        memory = dict(memory)
        for operation in self._schedule(len(batches), window=1):
            if operation.kind == "backward":
                continue
            batch, chunk = batches[operation.micro_batch], operation.chunk
            self.activity.begin("receive of hidden states in an evaluation", waits=True)
            hidden = self.transport.receive_forward(chunk)
            self.activity.begin("forward in an evaluation")
            output, leaving, _ = self._forward(batch, chunk, hidden, self._of_chunk(memory, chunk), empty_memory=empty_memory)
            memory.update(leaving)
            if chunk == self.last_chunk:
                on_losses(batch, output)
            else:
                self.transport.send_forward(output, chunk)
        self.activity.begin("evaluation between micro-batches", waits=True)
        self.transport.wait_sends()
        return memory

    @torch.no_grad()
    def predict(self, batches: Sequence[Batch], memory: Memory, first: int | None) -> tuple[Memory, Tensor]:
        """Predict the most likely token after each position. This runs the forward only and needs a single pipeline stage.

        Args:
            batches: micro-batches whose rows have equal lengths, so that only the last micro-batch may end in padding.
            memory: memory before the first micro-batch.
            first: first position to predict, counted from the start of the first micro-batch. With None nothing is predicted
                and the output layer does not run.

        Returns:
            The memory after the last micro-batch, and token ids [B, positions from `first` to the last valid one].
        """
        assert self.layout.pp_size == 1, "the whole model is in this stage"
        found = [torch.empty(len(batches[0].tokens), 0, dtype=torch.int64, device=self.device)]
        start = 0
        for batch in batches:
            valid = int(batch.lengths[0].sum())
            wanted = slice(valid if first is None else min(max(first - start, 0), valid), valid)
            context = LayerContext(reset=batch.reset, lengths=batch.lengths, memory_in=dict(memory), output_positions=wanted)
            logits = self.engine.forward(
                input_ids=to_device(batch.tokens, self.device),
                position_ids=None,
                attention_mask=None,
                packed_seq_params=context,
                runtime_gather_output=True,
            )
            memory = context.memory_out
            found.append(logits.argmax(dim=-1))
            start += valid
        return memory, torch.cat(found, dim=1)

    def _schedule(self, num_micro_batches: int, window: int) -> list[Operation]:
        layout = self.layout
        return segment_schedule(layout.pp_size, layout.pp_rank, num_micro_batches, window, virtual_stages=layout.virtual_stages)

    def _of_chunk(self, memory: Memory, chunk: int) -> Memory:
        return {layer: state for layer, state in memory.items() if layer in self.chunk_layers[chunk]}

    def _forward(
        self, batch: Batch, chunk: int, hidden: Tensor | None, memory: Memory, *, empty_memory: bool = False
    ) -> tuple[Tensor, Memory, Tensor]:
        """Run one chunk.

        Returns:
            The chunk's output (token losses [B, T] for the last chunk), the memory after the micro-batch, and the weighted
            sum of token losses.
        """
        is_last = chunk == self.last_chunk
        # Lengths and resets stay on the host, where the attention decides which computations it can skip.
        context = LayerContext(
            reset=batch.reset,
            memory_reset=torch.ones_like(batch.reset) if empty_memory else None,
            lengths=batch.lengths,
            repeats=batch.repeats if bool((batch.repeats > 1).any()) else None,
            memory_in=dict(memory),
            cp_group=self.context_group,
        )
        output = self.engine.forward(
            chunk=chunk,
            hidden=hidden,
            input_ids=to_device(batch.tokens, self.device),
            position_ids=None,
            attention_mask=None,
            labels=to_device(batch.targets, self.device) if is_last else None,
            packed_seq_params=context,
        )
        if not is_last:
            return output, context.memory_out, output.new_zeros(())
        loss = (output.float() * to_device(batch.loss_mask, self.device)).sum()
        return output, context.memory_out, loss

    def memory_gradient_squares(self) -> dict[int, Tensor]:
        """Return, by layer, the summed squares of the memory gradients at the micro-batch boundaries of the last step.

        They are gradients of the scaled loss. They train the memory writes across micro-batch boundaries.
        """
        return {layer: torch.stack(norms).square().sum() for layer, norms in self._memory_gradient_norms.items()}

    def _record_memory_gradient_norms(self, gradients: dict[int, LayerMemory]) -> None:
        """Record gradient norms with few operations, because in the backward of small models the GPU waits for the host."""
        for layer, gradient in gradients.items():
            norms = self._memory_gradient_norms.setdefault(layer, [])
            tensors = [tensor for tensor in without_tail(gradient) if tensor.is_floating_point()]
            norms += [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]

    def _backward(
        self, live: _Live, gradient: Tensor | None, memory_gradients: dict[int, LayerMemory]
    ) -> dict[int, LayerMemory]:
        """Back-propagate one micro-batch and return the gradients of its incoming memory, by layer."""
        assert live.output is not None and live.memory_out is not None
        outputs = [live.output]
        gradients = [torch.ones_like(live.output) if gradient is None else gradient]
        for layer, leaving in memory_gradients.items():
            pairs = zip(live.memory_out[layer], leaving, strict=True)
            # Counters and tensors that a variant detaches take no gradient.
            differentiable = [(tensor, its_gradient) for tensor, its_gradient in pairs if tensor.requires_grad]
            outputs += [tensor for tensor, _ in differentiable]
            gradients += [its_gradient for _, its_gradient in differentiable]
        assert isinstance(self.engine, Engine), "an inference engine has no backward"
        self.engine.backward(outputs, gradients)
        return {
            layer: map_tensors(lambda tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, state)
            for layer, state in live.memory_in.items()
            if any(tensor.requires_grad for tensor in state)
        }


def _entering(memory: Memory, *, window_start: bool) -> Memory:
    """Return the memory as leaves of a micro-batch's autograd graph. Gradients stop at the start of a window."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(not window_start and tensor.is_floating_point())

    return {layer: map_tensors(leaf, state) for layer, state in memory.items()}


def detach_memory(memory: Memory) -> Memory:
    """Return the memory of all layers detached from the autograd graph."""
    return {layer: detached(state) for layer, state in memory.items()}
