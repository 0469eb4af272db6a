"""The training loop: next windows, schedule, step, evaluation, metrics, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infini_train.attention import state_numbers
from infini_train.attention.kernel_choice import describe_kernels
from infini_train.checkpoint.checkpointer import newest_checkpoint
from infini_train.checkpoint.folder import list_checkpoints
from infini_train.checkpoint.weights import load_initial_weights
from infini_train.config import RunConfig, save_config
from infini_train.data.dataset import TokenDataset
from infini_train.measurement.perplexity import held_out_loss
from infini_train.measurement.read_back import ReadBack
from infini_train.model.gpt import DTYPES
from infini_train.parallel.layout import raise_everywhere
from infini_train.resilience.health import loss_spiked, roll_back, stop_after_skips
from infini_train.resilience.run_lock import RunDirectoryLock
from infini_train.resilience.stop_request import RESUMABLE_EXIT_CODE, StopRequest
from infini_train.resilience.watchdog import Watchdog
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError
from infini_train.training.memory_statistics import memory_statistics
from infini_train.training.memory_warnings import memory_warnings
from infini_train.training.metrics import MetricsWriter
from infini_train.training.profile import StepProfiler
from infini_train.training.progress import TrainingProgress
from infini_train.training.self_test import self_test
from infini_train.training.shard_check import open_training_data
from infini_train.training.step import train_step
from infini_train.training.training_run import TrainingRun, build_training_run


def pretrain(run: RunConfig) -> int:
    """Train until `training.steps`, resuming from the newest checkpoint of the run directory if there is one.

    Returns:
        The exit code: 0 after the last step, RESUMABLE_EXIT_CODE if a signal stopped the run (a checkpoint is saved first).
    """
    with StopRequest() as stop, RunDirectoryLock(run) as lock, Watchdog(run) as watchdog:
        if run.training.self_test:
            self_test(run)
        warnings: list[str] = []
        watchdog.activity.begin("verification of the shards")
        dataset = open_training_data(run, warnings.append)
        held_out = TokenDataset(Path(run.data.path), "held_out")
        watchdog.activity.begin("building the model")
        training = build_training_run(run, dataset)
        training.held_out = held_out
        activity = training.pipeline.activity = watchdog.activity
        state, main = training.state, training.layout.is_main
        resumed_from = _resume(training, warnings)
        started_from = (
            load_initial_weights(run, training.engine, training.checkpointer.placements)
            if resumed_from is None and run.training.initial_weights
            else None
        )
        _open_run_directory(training)
        with (
            _wait_for_pending_save(training),
            MetricsWriter(run, state.step, enabled=main) as metrics,
            TrainingProgress(run.training.steps, state.step, enabled=main) as progress,
        ):
            progress.say(describe_kernels(run.model, DTYPES[run.training.precision], platform.device()))
            for line in warnings:
                progress.say(line)
            if resumed_from is not None:
                progress.say(f"resuming from {resumed_from}")
            if started_from is not None:
                progress.say(started_from)
            profiler = StepProfiler(run, training.layout, progress.say)
            save_due = False
            while state.step < run.training.steps:
                record, stopped = train_step(training, stop)
                profiler.after_step(record, last=stopped)
                lock.check_held()
                spiked = loss_spiked(run.health, state.health, record)
                _evaluate_when_due(training, record, progress)
                record["spike"] = int(spiked)
                record["documents_left_out"] = int((~dataset.available).sum())
                _log_when_due(training, record, metrics, progress)
                stop_after_skips(run, state, training.checkpointer)
                rolled_back_to = _on_spike(training, record, progress) if spiked else None
                if rolled_back_to is not None:
                    save_due = False
                else:
                    save_due |= _is_due(run, run.checkpoint.every, state.step)
                    # A checkpoint that is due at a skipped step is postponed to the next step that is not skipped.
                    if stopped or state.step == run.training.steps or (save_due and not record["skipped"]):
                        with activity.during("save", limit="save"):
                            training.checkpointer.save(training.engine, state)
                        save_due = False
                if stopped and state.step < run.training.steps:
                    saved = rolled_back_to or _finish_save(training)
                    progress.say(f"stopped: {saved} is saved, and the same command goes on from there")
                    return RESUMABLE_EXIT_CODE
            profiler.close(state.step)
            _finish_save(training)
            progress.say(f"trained to step {state.step}: {list_checkpoints(Path(run.run_dir))[-1]}")
    return 0


@contextmanager
def _wait_for_pending_save(training: TrainingRun) -> Iterator[None]:
    """Wait for the save in progress when the block ends, also after an exception."""
    try:
        yield
    finally:
        with training.pipeline.activity.during("end of the save", limit="save"):
            training.checkpointer.writer.wait()


def _finish_save(training: TrainingRun) -> Path | None:
    with training.pipeline.activity.during("end of the save", limit="save"):
        return training.checkpointer.finish(must_succeed=True)


def _is_due(run: RunConfig, every: int, step: int) -> bool:
    """Return whether a periodic action is due after this step. It is also due after the last step, unless `every` is 0."""
    return every > 0 and (step % every == 0 or step == run.training.steps)


def _evaluate_when_due(training: TrainingRun, record: dict[str, Any], progress: TrainingProgress) -> None:
    """Evaluate on held-out text if it is due, and add the results to the step's metrics.

    The results are the loss with memory and with emptied memory, what keys read back of new writes, and the strength of learned
    writes.
    """
    run, step = training.run, record["step"]
    if not _is_due(run, run.evaluation.every, step):
        return
    limit = run.evaluation.micro_batches
    with ReadBack(run, training.layout, training.engine.module) as read_back:
        record["held_out_loss"] = held_out_loss(
            run, training.layout, training.pipeline, limit=limit, dataset=training.held_out
        ).loss
    found = read_back.result()
    if found is not None and found["ages"]:
        record["memory_read_back"] = found["own_key"][0]
    if found is not None and found["write_strength"]:
        record["memory_write_strength"] = found["write_strength"]
    if state_numbers(run.model):
        emptied = held_out_loss(
            run, training.layout, training.pipeline, limit=limit, dataset=training.held_out, memory="emptied"
        )
        record["held_out_loss_memory_emptied"] = emptied.loss
    progress.say(f"step {step}: held-out loss {record['held_out_loss']:.4f} nats per token")


def _log_when_due(training: TrainingRun, record: dict[str, Any], metrics: MetricsWriter, progress: TrainingProgress) -> None:
    """Write the step's metrics and memory statistics if logging is due. A collective over all ranks when it writes."""
    run, step = training.run, record["step"]
    if record["skipped"]:
        progress.say(f"step {step}: skipped, a gradient is not finite ({training.state.health.consecutive_skips} in a row)")
    if _is_due(run, run.logging.every, step) or "held_out_loss" in record or record["skipped"] or record["spike"]:
        squares = training.pipeline.memory_gradient_squares()
        record.update(memory_statistics(run, training.layout, training.engine, training.state.memory, squares))
        record.update(training.checkpointer.writer.report())
        metrics.write(record)
    if "held_out_loss" in record:
        for warning in memory_warnings(run, record):
            progress.say(f"step {step}: warning: {warning}")
    progress.update(step, record)


def _on_spike(training: TrainingRun, record: dict[str, Any], progress: TrainingProgress) -> Path | None:
    """Report a spike and roll back if health.on_spike says so; return the checkpoint after a rollback, else None."""
    step, health = record["step"], training.run.health
    line = (
        f"step {step}: loss {record['loss']:.4f} is a spike, {record['loss_zscore']:.1f} robust standard deviations above the "
    )
    progress.say(line + f"median of {health.spike_window} steps")
    if health.on_spike == "report":
        return None
    checkpoint = roll_back(
        training.run, training.engine, training.state, training.checkpointer, training.pipeline.activity, progress.say
    )
    if checkpoint is None:
        progress.say("there is no checkpoint to roll back to yet: training goes on")
    else:
        progress.say(f"rolled back to {checkpoint}; the data read between it and step {step} is left out")
    return checkpoint


def _resume(training: TrainingRun, warnings: list[str]) -> Path | None:
    """Load the newest intact checkpoint, if there is one; add a line to the warnings for each newer one that is damaged."""
    newest = newest_checkpoint(Path(training.run.run_dir), warnings.append)
    if newest is not None:
        training.checkpointer.load(newest, training.engine, training.state)
    return newest


def _open_run_directory(training: TrainingRun) -> None:
    error = None
    if training.layout.is_main:
        path = Path(training.run.run_dir) / "config.yaml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_config(training.run, path)
        except OSError as failure:
            error = UserError(f"{path} cannot be written: {failure.strerror or failure}; make room, or name another run_dir")
    raise_everywhere(error)
