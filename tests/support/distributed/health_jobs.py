"""Jobs with injected faults: bad gradients, loss spikes, slow ranks and damaged data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infini_train.checkpoint import writer
from infini_train.checkpoint.checkpointer import Checkpointer
from infini_train.config import RunConfig
from infini_train.parallel.deepspeed.optimizer_state import read_optimizer_state, stepped_tensors
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.resilience.stop_request import StopRequest
from infini_train.runtime.errors import UserError
from infini_train.training import loop
from infini_train.training import training_run as setup
from infini_train.training.step import train_step
from infini_train.training.training_run import TrainingRun, build_training_run


class Fault:
    """A fault in one rank's computation while it is armed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.armed = False

    def _active(self) -> bool:
        return self.armed and torch.distributed.get_rank() == self.rank

    def in_gradient(self, parameter: str, value: float) -> Callable[[torch.nn.Module], torch.nn.Module]:
        """Set one entry of the gradient of each parameter whose name ends with `parameter`."""

        def poison(gradient: Tensor) -> Tensor:
            if self._active():
                gradient = gradient.clone()
                gradient.view(-1)[-1] = value
            return gradient

        def prepare(module: torch.nn.Module) -> torch.nn.Module:
            for name, each in module.named_parameters():
                if name.endswith(parameter):
                    each.register_hook(poison)
            return module

        return prepare

    def in_loss(self) -> Callable[[torch.nn.Module], torch.nn.Module]:
        """Multiply the input of the output layer by 100: a loss spike with finite gradients."""

        def enlarge(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
            return output * 100.0 if self._active() else output

        def prepare(module: torch.nn.Module) -> torch.nn.Module:
            norms = [each for name, each in module.named_modules() if name.endswith("final_layernorm")]
            norms[-1].register_forward_hook(enlarge)
            return module

        return prepare

    def in_forward(self, row: int) -> Callable[[torch.nn.Module], torch.nn.Module]:
        """Set the queries, keys and values of one row in this stage's last layer to NaN."""

        def poison(_: torch.nn.Module, __: Any, output: Any) -> Any:
            if self._active():
                fused = output[0].clone()
                fused[:, row] = float("nan")
                return fused, *output[1:]
            return output

        def prepare(module: torch.nn.Module) -> torch.nn.Module:
            layers = [each for name, each in module.named_modules() if name.endswith("linear_qkv")]
            layers[-1].register_forward_hook(poison)
            return module

        return prepare


def _build(run: RunConfig, prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> TrainingRun:
    """Build a run whose module is changed by `prepare` before DeepSpeed and the engine add their hooks."""
    build_stage = setup.build_stage
    setup.build_stage = lambda *arguments: prepare(build_stage(*arguments))
    try:
        return build_training_run(run)
    finally:
        setup.build_stage = build_stage


def _all_tensors(training: TrainingRun) -> dict[str, Tensor]:
    """Return this rank's module weights, master weights, moments and Adam step counts."""
    found = {f"{kind}.{name}": x for kind, each in read_optimizer_state(training.engine).items() for name, x in each.items()}
    found |= {
        f"stepped.{i}": training.engine.adamw.state[x]["step"].clone() for i, x in enumerate(stepped_tensors(training.engine))
    }
    if training.run.layout.zero_stage != 3:
        found |= {f"module.{name}": x.detach().clone() for name, x in training.engine.module.named_parameters()}
    return found


def _differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def skip_a_step(run: RunConfig, rank: int, parameter: str | None, value: float) -> dict[str, Any]:
    """Train two good steps, one with the fault, and one good step.

    Args:
        parameter: its gradient gets one entry `value`; None sets the rank's first row to NaN in the forward instead.
    """
    fault = Fault(rank)
    training = _build(run, fault.in_forward(0) if parameter is None else fault.in_gradient(parameter, value))
    records = [train_step(training, StopRequest())[0] for _ in range(2)]
    before = _all_tensors(training)
    fault.armed = True
    records.append(train_step(training, StopRequest())[0])
    fault.armed = False
    kept = _differing(before, _all_tensors(training))
    memory = {layer: tuple(tensor.clone() for tensor in state) for layer, state in training.state.memory.items()}
    consecutive = training.state.health.consecutive_skips
    records.append(train_step(training, StopRequest())[0])
    changed = set(_differing(before, _all_tensors(training)))
    return {
        "skipped": [record["skipped"] for record in records],
        "grad_norm": [record["grad_norm"] for record in records],
        "tokens": [record["tokens"] for record in records],
        "changed_by_the_skipped_step": kept,
        "unchanged_by_the_next": [name for name in before if name not in changed],
        "memory": memory,
        "rows": list(training.layout.rows(run.training.rows)),
        "health": (consecutive, training.state.health.state_dict()),
    }


def load_after_a_skip(run: RunConfig) -> dict[str, Any]:
    """Train, skip a step and save; then load into a fresh engine."""
    fault = Fault(0)
    training = _build(run, fault.in_gradient("mlp.linear_fc2.weight", float("nan")))
    train_step(training, StopRequest())
    fault.armed = True
    train_step(training, StopRequest())
    training.checkpointer.save(training.engine, training.state)
    path = training.checkpointer.finish(must_succeed=True)
    loaded = build_training_run(run)
    loaded.checkpointer.load(path, loaded.engine, loaded.state)
    return {
        "different": _differing(_all_tensors(training), _all_tensors(loaded)),
        "health": loaded.state.health.state_dict(),
        "adam_steps": {float(loaded.engine.adamw.state[x]["step"]) for x in stepped_tensors(loaded.engine)},
    }


def pretrain_with_bad_gradients(run: RunConfig, rank: int, first: int, last: int) -> tuple[str, int] | int:
    """Run `pretrain` with a NaN in the gradient of one rank from step `first` to `last`.

    Returns:
        The exit code; after an error, its message and exit code.
    """
    fault = Fault(rank)
    build_stage, step = setup.build_stage, loop.train_step
    prepare = fault.in_gradient("mlp.linear_fc2.weight", float("nan"))

    def train_step_with_fault(training: TrainingRun, stop: StopRequest) -> Any:
        fault.armed = first <= training.state.step + 1 <= last
        return step(training, stop)

    setup.build_stage = lambda *arguments: prepare(build_stage(*arguments))
    loop.train_step = train_step_with_fault
    try:
        return loop.pretrain(run)
    except UserError as error:
        return str(error), error.exit_code
    finally:
        setup.build_stage, loop.train_step = build_stage, step


def pretrain_with_spikes(run: RunConfig, rank: int, spikes: list[int], save_seconds: float = 0.0) -> dict[str, Any]:
    """Run `pretrain` with loss spikes on one rank.

    Args:
        spikes: numbers of the calls of `train_step` with a spike, from 1.
        save_seconds: extra time that the background write of a checkpoint takes.

    Returns:
        `end`: exit code, or error message and exit code. `seen`: before each step, the step number, stream positions, weights
        and moments, and the largest entry of the memory.
    """
    fault = Fault(rank)
    build_stage, step = setup.build_stage, loop.train_step
    seen: list[dict[str, Any]] = []

    def train_step_with_fault(training: TrainingRun, stop: StopRequest) -> Any:
        state = training.state
        largest = max((float(x.M.abs().max()) for x in state.memory.values()), default=0.0)
        seen.append({"step": state.step, "positions": state.reader.state(), "all": _all_tensors(training), "memory": largest})
        fault.armed = len(seen) in spikes
        return step(training, stop)

    def write_slowly(self: Any, *arguments: Any, **keywords: Any) -> Any:
        time.sleep(save_seconds)
        return write_data(self, *arguments, **keywords)

    setup.build_stage = lambda *arguments: fault.in_loss()(build_stage(*arguments))
    write_data, writer._Files.write_data = writer._Files.write_data, write_slowly
    loop.train_step = train_step_with_fault
    try:
        return {"end": loop.pretrain(run), "seen": seen}
    except UserError as error:
        return {"end": (str(error), error.exit_code), "seen": seen}
    finally:
        setup.build_stage, loop.train_step, writer._Files.write_data = build_stage, step, write_data


def positions_after(run: RunConfig, steps: int) -> Tensor:
    """Return the positions of this rank's streams after some steps of an undisturbed run."""
    reader = build_training_run(run).state.reader
    for _ in range(steps * run.micro_batches_per_step):
        reader.next(run.training.segments_per_micro_batch)
    return reader.state()


def pretrain_slowly(run: RunConfig, rank: int, seconds: float) -> int:
    """Run `pretrain` with a delay of `seconds` in the first forward and in the first save on one rank."""
    forward, save = SegmentPipeline._forward, Checkpointer.save
    slow = {"forward", "save"}

    def delay(name: str) -> None:
        if name in slow and torch.distributed.get_rank() == rank:
            slow.remove(name)
            time.sleep(seconds)

    def slow_forward(self: SegmentPipeline, *arguments: Any, **keywords: Any) -> Any:
        delay("forward")
        return forward(self, *arguments, **keywords)

    def slow_save(self: Checkpointer, *arguments: Any) -> Any:
        delay("save")
        return save(self, *arguments)

    SegmentPipeline._forward, Checkpointer.save = slow_forward, slow_save
    try:
        return loop.pretrain(run)
    finally:
        SegmentPipeline._forward, Checkpointer.save = forward, save


def damage_next_document(run: RunConfig, rank: int) -> str:
    """Train a step, overwrite the next document of one rank's first row, and return the error of the next step."""
    training = build_training_run(run)
    train_step(training, StopRequest())
    reader = training.state.reader
    dataset = reader.dataset
    if torch.distributed.get_rank() == rank:
        document = reader._current(0)[0]
        with dataset._files[dataset._shard[document]].open("r+b") as file:
            file.seek(int(dataset._offset[document]))
            file.write(b"\xff" * (2 * int(dataset.document_lengths[document])))
    torch.distributed.barrier()
    try:
        train_step(training, StopRequest())
    except UserError as error:
        return str(error)
    return "nothing"
