"""`infini-train evaluate compare`: train attention variants on the same data, one run for each variant and seed.

Every run is an ordinary training run in its own folder. Finished runs are kept. The same command resumes a stopped comparison.
The results of a finished run are stored in compare.json and read from there, so the run's folder may be deleted.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from infini_train.attention import state_numbers
from infini_train.checkpoint.folder import list_checkpoints, read_state_file
from infini_train.checkpoint.reader import describe_tensors
from infini_train.config import ModelConfig, RunConfig, difference_from, save_config
from infini_train.config.overrides import with_overrides
from infini_train.report.compare_record import Measured, add_to_record, data_fingerprint, read_record
from infini_train.report.run_results import read_json, read_metrics
from infini_train.resilience.stop_request import RESUMABLE_EXIT_CODE
from infini_train.runtime import platform
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import COPIED_RUN_DIR, check_writable, report_write_errors, write_result


@dataclass(frozen=True)
class CompareRun:
    """One training run of a comparison."""

    variant: str
    seed: int
    run: RunConfig

    @property
    def key(self) -> tuple[str, int]:
        """Variant and seed, as in `Measured.key`."""
        return self.variant, self.seed


def compare_runs(run: RunConfig) -> list[CompareRun]:
    """Return all runs of the comparison.

    The runs are ordered by seed, so that a stopped comparison has results of all variants for its first seeds.

    Raises:
        UserError: a variant is not valid.
    """
    return [_variant_run(run, variant, seed) for seed in run.compare.seeds for variant in run.compare.variants]


def variant_model(run: RunConfig, variant: str) -> ModelConfig:
    """Return the model configuration of a variant.

    Args:
        variant: `NAME` or `NAME key=value ...`: a value of model.attention, and keys of the section model.

    Raises:
        UserError: an unknown key or an invalid value.
    """
    values = {}
    for change in f"attention={variant}".split():
        key, separator, value = change.partition("=")
        if not separator or not value:
            raise UserError(f"compare.variants has {variant!r}; write for example infini or 'infini update_rule=delta'")
        values[f"model.{key}"] = value
    return with_overrides(run, values, f"compare.variants has {variant!r}").model


def _variant_run(run: RunConfig, variant: str, seed: int) -> CompareRun:
    folder = Path(run.run_dir) / "-".join(variant.replace("=", "-").split()) / f"seed-{seed}"
    changed = replace(
        run,
        run_dir=str(folder),
        model=variant_model(run, variant),
        training=replace(run.training, seed=seed),
        logging=replace(run.logging, wandb="off"),
    )
    return CompareRun(variant, seed, changed)


def compare(run: RunConfig) -> int:
    """Train and evaluate all unfinished runs. Write compare.json, compare.md and compare.html after each run.

    Returns:
        0, or the exit code of the command that stopped the comparison.

    Raises:
        UserError: an earlier run has other settings or other data, or a folder cannot be written.
    """
    from infini_train.report.compare_page import markdown_table

    runs = compare_runs(run)
    fingerprint = data_fingerprint(run)
    record = read_record(run, fingerprint)
    for each in runs:
        folder = Path(each.run.run_dir)
        if (changed := difference_from(folder / "variant.yaml", each.run)) is not None:
            raise UserError(f"{folder} belongs to other settings ({changed}); set it back, or choose another run_dir")
        if each.key not in record:
            _check_documents(folder, run, fingerprint)
    if any(each.key not in record for each in runs):
        check_writable(Path(run.run_dir), f"run_dir {run.run_dir}", COPIED_RUN_DIR)
    for number, each in enumerate(runs, start=1):
        if each.key in record:
            continue
        name = f"{number} of {len(runs)}: {each.variant}, seed {each.seed}"
        for command in _remaining_commands(each):
            print(f"compare: {name}: {command}", file=sys.stderr, flush=True)
            code = _run(command, each)
            if code:
                print(f"compare: {name}: exit code {code}; run the same command again to resume", file=sys.stderr)
                return code
        record = add_to_record(run, fingerprint, _measure(each))
        _write_tables(run, [record[each.key] for each in runs if each.key in record])
    measured = [record[each.key] for each in runs]
    print(markdown_table(run, measured))
    _write_tables(run, measured)
    print(f"plot: {Path(run.run_dir) / 'compare.html'}")
    return 0


def _check_documents(folder: Path, run: RunConfig, fingerprint: str | None) -> None:
    """Refuse a folder whose checkpoint was trained on other documents.

    A fully trained run is not trained again, so no later check would find that the data has changed.
    """
    for checkpoint in list_checkpoints(folder)[-1:]:
        saved = read_state_file(checkpoint).get("dataset_fingerprint")
        if None not in (saved, fingerprint) and saved != fingerprint:
            raise UserError(
                f"{folder} was trained on other documents than data.path {run.data.path} holds; set data.path to those "
                "documents, or choose another run_dir"
            )


def _remaining_commands(each: CompareRun) -> Iterator[str]:
    """Yield the commands that the run still needs: pretrain, evaluate, or both."""
    folder = Path(each.run.run_dir)
    done = [path for path in list_checkpoints(folder) if path.name == f"step_{each.run.training.steps:08d}"]
    if not done:
        yield "pretrain"
    evaluation = read_json(folder / "evaluation.json", "evaluate", [])
    if evaluation is None or evaluation.get("step") != each.run.training.steps:
        yield "evaluate"


def _run(command: str, each: CompareRun) -> int:
    """Run an infini-train command in one process and return its exit code."""
    folder = Path(each.run.run_dir)
    with report_write_errors(folder / "variant.yaml", COPIED_RUN_DIR):
        folder.mkdir(parents=True, exist_ok=True)
        save_config(each.run, folder / "variant.yaml")
    return run_forwarding_signals([sys.executable, "-m", "infini_train", command, "--config", str(folder / "variant.yaml")])


def run_forwarding_signals(arguments: list[str]) -> int:
    """Run a command, forward SIGINT and SIGTERM to it, wait for it to exit, and return its exit code.

    If the command received a signal and still exits with 0, return RESUMABLE_EXIT_CODE, so that the caller starts nothing more.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, forward) for number in signals]
    try:
        # Start a new session. Otherwise Ctrl-C in a terminal would reach the command twice.
        process = subprocess.Popen(arguments, start_new_session=True)
        for number in received:  # signals that arrived before the process existed
            process.send_signal(number)
        code = process.wait()
        return RESUMABLE_EXIT_CODE if received and code == 0 else code
    finally:
        for number, handler in zip(signals, earlier, strict=True):
            signal.signal(number, handler)


def _measure(each: CompareRun) -> Measured:
    """Read the results of a finished run from its folder."""
    folder = Path(each.run.run_dir)
    evaluation = read_json(folder / "evaluation.json", "evaluate", [])
    records = read_metrics(folder / "metrics.jsonl")
    assert evaluation is not None, "the evaluate command has just written evaluation.json"
    rates = records.column("tokens_per_second")[len(records.rows) // 10 :]
    tensors = describe_tensors(list_checkpoints(folder)[-1])
    emptied = evaluation.get("memory_emptied")
    return Measured(
        each.variant,
        each.seed,
        math.nan if (loss := evaluation["with_memory"]["loss"]) is None else loss,
        None if emptied is None else emptied["loss"],
        sum(math.prod(entry.size) for name, entry in tensors.items() if name.startswith("model.")),
        state_numbers(each.run.model),
        float(np.nanmedian(rates)),
        float(np.nanmax(records.column("peak_memory"))),
        machine(),
    )


def _write_tables(run: RunConfig, measured: list[Measured]) -> None:
    from infini_train.report.compare_page import compare_page, markdown_table

    folder = Path(run.run_dir)
    write_result(folder / "compare.md", markdown_table(run, measured), COPIED_RUN_DIR)
    write_result(folder / "compare.html", compare_page(run, measured), COPIED_RUN_DIR)


def machine() -> str:
    """Return a description of the hardware and the torch version of this process."""
    if platform.has_cuda():
        return f"one process, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    cores = "one core" if threads == 1 else f"{threads} cores"
    return f"one process, {platform.processor()} ({cores}), torch {torch.__version__}"
