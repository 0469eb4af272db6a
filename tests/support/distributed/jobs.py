"""Jobs that the ranks of a test run. Results are numbers, and CPU tensors with their position in the global tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor

from infini_train.attention import map_tensors
from infini_train.attention.rivals.memory_tokens import MemoryTokens
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.measurement import perplexity
from infini_train.measurement.generation import StreamingModel
from infini_train.measurement.perplexity import HeldOutLoss, held_out_loss, shuffled_run
from infini_train.measurement.read_back import ReadBack
from infini_train.model.layer_context import LayerContext, Memory
from infini_train.parallel.deepspeed.optimizer_state import read_optimizer_state
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.resilience.stop_request import StopRequest
from infini_train.runtime.errors import UserError
from infini_train.training.memory_statistics import memory_statistics
from infini_train.training.self_test import self_test
from infini_train.training.step import train_step
from infini_train.training.training_run import TrainingRun, build_training_run
from tests.support.distributed.exchange import recorded_exchange


def train(run: RunConfig, steps: int, resumable: bool = False) -> dict[str, Any]:
    """Train some steps. Return their losses and gradient norms, and this rank's slices of weights and memory.

    Args:
        resumable: resume from the newest checkpoint of the run directory, if there is one, and save another at the end.
    """
    training = build_training_run(run)
    initial = weights(training)
    if resumable and (saved := list_checkpoints(Path(run.run_dir))):
        training.checkpointer.load(saved[-1], training.engine, training.state)
    records = [train_step(training, StopRequest())[0] for _ in range(steps)]
    if resumable:
        training.checkpointer.save(training.engine, training.state)
        training.checkpointer.finish(must_succeed=True)
    return {
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "initial": initial,
        "weights": weights(training),
        "memory": _memory(training),
        "not_by_head": [layer for layer, state in training.state.memory.items() if isinstance(state, MemoryTokens)],
        "positions": (training.layout.dp_rank, training.state.reader.state()),
    }


def weights(training: TrainingRun) -> dict[str, tuple[int | None, int, int, Tensor]]:
    """Return global name -> (split dimension, blocks, tensor rank, local float32 slice)."""
    state = training.engine.module.named_parameters()
    placements = training.checkpointer.placements
    if training.run.layout.zero_stage == 3:
        import deepspeed

        slices = {}
        for name, parameter in state:
            with deepspeed.zero.GatheredParameters(parameter):
                slices[name] = parameter.detach().clone().float()
    else:
        slices = {name: parameter.detach().clone().float() for name, parameter in state}
    return {
        placements[name].name: (placements[name].dim, placements[name].blocks, placements[name].rank, value)
        for name, value in slices.items()
    }


def _memory(training: TrainingRun) -> dict[int, tuple[Any, ...]]:
    """Return layer -> (data-parallel rank, tensor rank, M, z); the last two differ for other kinds of attention."""
    layout = training.layout
    return {layer: (layout.dp_rank, layout.tp_rank, *state) for layer, state in training.state.memory.items()}


def streaming_logits(run: RunConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [T, V] of a document streamed in chunks of odd sizes, and those of one pass over the whole document."""
    training = build_training_run(run)
    for _ in range(3):
        train_step(training, StopRequest())
    module = training.engine.module.eval()
    stream = StreamingModel(module, run)
    pieces, start, sizes = [], 0, [37, 1, 1, 100, 5]
    while start < tokens.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces += [logits[0] for logits in stream.feed(tokens[:, start : start + size])]
        start += size
    segments = -(-tokens.shape[1] // run.model.segment_length)
    lengths = torch.full((1, segments), run.model.segment_length)
    lengths[0, -1] = tokens.shape[1] - (segments - 1) * run.model.segment_length
    reset = torch.zeros(1, segments, dtype=torch.bool)
    reset[0, 0] = True
    with torch.no_grad():
        whole = module(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            packed_seq_params=LayerContext(reset=reset, lengths=lengths),
            runtime_gather_output=True,
        )
    return torch.cat(pieces), whole[0].float()


def output_layer_positions(run: RunConfig) -> list[int]:
    """Return the number of positions in each call of the output layer during one training step."""
    training = build_training_run(run)
    positions = []
    layer = training.engine.module.chunk(0).output_layer
    layer.register_forward_pre_hook(lambda module, arguments: positions.append(arguments[0].shape[0]))
    train_step(training, StopRequest())
    return positions


def save_after(run: RunConfig, steps: int, more: int) -> dict[str, Any]:
    """Train, save, and train some more steps. A resumed run must reproduce the results of the latter."""
    training = build_training_run(run)
    for _ in range(steps):
        train_step(training, StopRequest())
    training.checkpointer.save(training.engine, training.state)
    training.checkpointer.finish(must_succeed=True)
    return _continue(training, more)


def load_and_train(run: RunConfig, steps: int) -> dict[str, Any]:
    """Load the newest checkpoint of the run directory in this layout and train."""
    training = build_training_run(run)
    training.checkpointer.load(list_checkpoints(Path(run.run_dir))[-1], training.engine, training.state)
    return _continue(training, steps)


def resume_train_save(run: RunConfig, steps: int) -> dict[str, Any]:
    """Resume from the newest checkpoint, train some steps and save. Return the loaded and saved states and the data reads."""
    training = build_training_run(run)
    if list_checkpoints(Path(run.run_dir)):
        training.checkpointer.load(list_checkpoints(Path(run.run_dir))[-1], training.engine, training.state)
    loaded = _state(training)
    dataset, reads = training.state.reader.dataset, []
    read = dataset.read

    def recorded(document: int, start: int, count: int) -> Any:
        reads.append((document, start, count))
        return read(document, start, count)

    dataset.read = recorded  # type: ignore[method-assign]
    losses = [train_step(training, StopRequest())[0]["loss"] for _ in range(steps)]
    training.checkpointer.save(training.engine, training.state)
    training.checkpointer.finish(must_succeed=True)
    layout = training.layout
    return {
        "loaded": loaded,
        "saved": _state(training),
        "loss": losses,
        # Ranks that share rows read the same data; only one of them reports it.
        "reads": reads if layout.tp_rank == layout.cp_rank == layout.pp_rank == 0 else [],
    }


def _state(training: TrainingRun) -> dict[str, Any]:
    """Return this rank's slices of weights and moments by kind, and of memory."""
    placements = training.checkpointer.placements
    return {
        **{
            kind: {
                placements[name].name: (placements[name].dim, placements[name].blocks, placements[name].rank, value)
                for name, value in tensors.items()
            }
            for kind, tensors in read_optimizer_state(training.engine).items()
        },
        "memory": _memory(training),
    }


def _continue(training: TrainingRun, steps: int) -> dict[str, Any]:
    records = [train_step(training, StopRequest())[0] for _ in range(steps)]
    return {
        "loss": [record["loss"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "weights": weights(training),
    }


def run_self_test(run: RunConfig, fault: str | None = None) -> str | None:
    """Run the self-test, optionally with an injected fault. Return its error message; None if it passes."""
    from infini_train.parallel.deepspeed import engine

    sum_gradients, step = engine._sum_gradients_over_tensor_group, engine.Engine.step

    def step_without_a_weight(self: engine.Engine, number: int) -> float:
        weights = {name: p for name, p in self.module.named_parameters() if "linear_fc2" in name}
        kept = {name: safe_get_full_fp32_param(p).clone() for name, p in weights.items()}
        norm = step(self, number)
        for name, parameter in self.module.named_parameters():
            if fault == "skip_a_weight_in_bfloat16" and parameter.dtype != torch.bfloat16:
                continue
            if name in kept and parameter.shape == kept[name].shape and not self.module.chunks[0].pre_process:
                safe_set_full_fp32_param(parameter, kept[name])
        return norm

    try:
        if fault == "drop_norm_gradients":
            engine._sum_gradients_over_tensor_group = lambda module: None
        if fault in ("skip_a_weight", "skip_a_weight_in_bfloat16"):
            engine.Engine.step = step_without_a_weight
        self_test(run)
    except UserError as error:
        return str(error)
    finally:
        engine._sum_gradients_over_tensor_group, engine.Engine.step = sum_gradients, step
    return None


def context_parallel_operation(rule: str, segment_length: int, segments: int) -> dict[str, Any]:
    """Compare infini_attention with segments spread over all ranks to one rank, in float64.

    Returns:
        The largest differences, the bytes gathered, and the order of communication and local attention.
    """
    import torch.distributed as dist

    from infini_kernels import MemoryState, infini_attention
    from infini_train.parallel.layout import initialize_process_group

    initialize_process_group()
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    B, T, H, G, D, Dv = 2, segments * segment_length, 4, 2, 6, 5

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"q": random(B, T, H, D), "k": random(B, T, G, D), "v": random(B, T, G, Dv), "gate": random(H)}
    state = {"M": random(B, G, D, Dv), "z": random(B, G, D).abs() + 1}
    weights = {"out": random(B, T, H, Dv), "M": random(B, G, D, Dv), "z": random(B, G, D)}
    reset = torch.rand(B, segments, generator=generator) < 0.25
    lengths = torch.randint(1, segment_length + 1, (B, segments), generator=generator)

    def run(tokens: slice, by_segment: slice, group: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {name: (x[:, tokens] if x.dim() == 4 else x).clone().requires_grad_() for name, x in inputs.items()}
        memory = {name: x.clone().requires_grad_() for name, x in state.items()}
        out, leaving = infini_attention(
            *leaves.values(),
            MemoryState(**memory),
            segment_length=segment_length,
            update_rule=rule,
            reset=reset[:, by_segment],
            lengths=lengths[:, by_segment],
            group=group,
        )
        # As in the pipeline, each rank uses its replica of the returned memory for its own share of the loss.
        share = 1.0 if group is None else (rank + 1) / (size * (size + 1) / 2)
        loss = (out * weights["out"][:, tokens]).sum()
        loss = loss + share * ((leaving.M * weights["M"]).sum() + (leaving.z * weights["z"]).sum())
        loss.backward()
        gradients = {name: x.grad for name, x in {**leaves, **memory}.items()}
        return {"out": out.detach(), "M": leaving.M.detach(), "z": leaving.z.detach()}, gradients

    expected, expected_gradients = run(slice(None), slice(None), None)
    tokens = slice(rank * T // size, (rank + 1) * T // size)
    with recorded_exchange() as record:
        ours, gradients = run(tokens, slice(rank * segments // size, (rank + 1) * segments // size), group)
    differences = {"out": (ours["out"] - expected["out"][:, tokens]).abs().max()}
    differences |= {name: (ours[name] - expected[name]).abs().max() for name in ("M", "z")}
    for name, gradient in gradients.items():
        theirs = expected_gradients[name]
        if name in ("q", "k", "v"):
            theirs = theirs[:, tokens]
        else:
            dist.all_reduce(gradient)
        differences[f"gradient of {name}"] = (gradient - theirs).abs().max()
    return {
        "differences": {name: float(value) for name, value in differences.items()},
        "bytes": record.bytes,
        "events": record.events,
    }


def held_out_losses(run: RunConfig, segments: int) -> dict[str, HeldOutLoss]:
    """Train three steps, then return the held-out losses with kept, emptied and shuffled memory.

    Args:
        segments: segments per micro-batch for the loss with shuffled memory.
    """
    training = build_training_run(run)
    for _ in range(3):
        train_step(training, StopRequest())
    losses = {memory: held_out_loss(run, training.layout, training.pipeline, memory=memory) for memory in ("kept", "emptied")}
    small = replace(run, training=replace(run.training, segments_per_micro_batch=segments))
    if segments == training.layout.cp_size:
        assert small == shuffled_run(run, training.layout)
    pipeline = SegmentPipeline(training.engine, small, training.layout, len(training.layout.rows(run.training.rows)))
    return losses | {"shuffled": held_out_loss(small, training.layout, pipeline, memory="shuffled")}


def read_back(run: RunConfig) -> dict[str, Any]:
    """Train three steps, then return the result of `ReadBack` over all held-out text."""
    training = build_training_run(run)
    for _ in range(3):
        train_step(training, StopRequest())
    with ReadBack(run, training.layout, training.engine.module) as found:
        held_out_loss(run, training.layout, training.pipeline)
    result = found.result()
    assert result is not None
    return result


def memory_gradient_norms(run: RunConfig) -> dict[str, Any]:
    """Return the memory gradient norms of the first step by layer, and the initial weights."""
    training = build_training_run(run)
    initial = weights(training)
    train_step(training, StopRequest())
    squares = training.pipeline.memory_gradient_squares()
    found = memory_statistics(run, training.layout, training.engine, training.state.memory, squares)
    return {"initial": initial, "norms": found.get("memory_grad_norm")}


def shuffled_by_hand(run: RunConfig) -> tuple[float, float]:
    """Compute the shuffled-memory loss by hand with two rows.

    A first pass collects the memory before each micro-batch. A second pass evaluates each micro-batch with the memories of the
    two rows exchanged.

    Returns:
        The loss summed over tokens of rows whose memory is not empty, and the same sum from `held_out_loss`.
    """
    training = build_training_run(run)
    for _ in range(3):
        train_step(training, StopRequest())
    dataset = TokenDataset(Path(run.data.path), "held_out")
    batches = list(perplexity._batches(run, training.layout, dataset, None))
    memories: list[Memory] = [{}]
    for batch in batches:
        memories.append(training.pipeline.evaluate([batch], memories[-1], lambda *_: None))
    total = 0.0
    for batch, memory in zip(batches[1:], memories[1:], strict=False):
        exchanged = {layer: map_tensors(lambda tensor: tensor.flip(0), state) for layer, state in memory.items()}
        losses: list[Tensor] = []
        training.pipeline.evaluate([batch], exchanged, lambda _, found, losses=losses: losses.append(found))
        filled = exchanged[1].z.flatten(1).sum(dim=1) > 0
        total += float((losses[0].double() * batch.loss_mask * filled[:, None]).sum())
    return total, float(held_out_loss(run, training.layout, training.pipeline, memory="shuffled").loss_sum.sum())
