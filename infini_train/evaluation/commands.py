"""The commands `infini-train evaluate` and `infini-train generate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from infini_train.attention import state_numbers
from infini_train.checkpoint.checkpointer import find_damage, newest_checkpoint
from infini_train.checkpoint.folder import damage, is_committed, read_state_file
from infini_train.checkpoint.weights import load_weights
from infini_train.checkpoint.weights_file import SUFFIX, read_weights_facts
from infini_train.config import LayoutConfig, RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.held_out import held_out_warning
from infini_train.data.manifest import load_manifest
from infini_train.measurement.generation import StreamingModel, sample_tokens
from infini_train.measurement.perplexity import (
    HeldOutLoss,
    Treatment,
    held_out_loss,
    position_bins,
    shuffled_run,
    unigram_entropy,
)
from infini_train.measurement.read_back import ReadBack
from infini_train.model.gpt import build_stage
from infini_train.model.parameter_placement import parameter_placements
from infini_train.parallel.deepspeed.engine import InferenceEngine
from infini_train.parallel.layout import Layout, initialize_layout, initialize_process_group
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.report.run_results import perplexity, shown_perplexity
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import write_json
from infini_train.tokenizers.tokenizer_file import tokenizer_of

MEASURED_SHARE = 0.9
"""Smallest fraction of the tokens in a position range that must be measured for its loss to be reported."""


@dataclass
class Loaded:
    """A trained model without an optimizer, and the step of its checkpoint."""

    run: RunConfig
    layout: Layout
    engine: InferenceEngine
    step: int


def inference_layout(run: RunConfig, world_size: int) -> RunConfig:
    """Return the run with the layout for inference.

    One process holds the whole model, whatever layout trained it: checkpoints load into any layout.
    """
    if world_size == 1:
        return replace(run, layout=LayoutConfig())
    return run


def find_checkpoint(run: RunConfig, checkpoint: str | None) -> Path:
    """Return the checkpoint that the user named, or the newest undamaged checkpoint of the run.

    A collective over all processes, which share the work of verifying the files.

    Raises:
        UserError: there is no checkpoint, or the named checkpoint is damaged.
    """
    if checkpoint is not None and checkpoint.endswith(SUFFIX):
        read_weights_facts(Path(checkpoint))
        return Path(checkpoint)
    initialize_process_group()
    if checkpoint is not None:
        path = Path(checkpoint)
        if wrong := find_damage(path) if is_committed(path) else damage(path):
            raise UserError(
                f"--from_checkpoint {checkpoint}: {'; '.join(wrong)}; name a folder step_XXXXXXXX of a run's checkpoints, "
                f"or a {SUFFIX} file of `infini-train checkpoint consolidate`"
            )
        return path
    newest = newest_checkpoint(Path(run.run_dir), _warn)
    if newest is None:
        raise UserError(f"run_dir {run.run_dir} holds no checkpoint; run `infini-train pretrain` first")
    return newest


def _warn(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, file=sys.stderr)


def load_model(run: RunConfig, checkpoint: Path) -> Loaded:
    """Build the model in the run's layout and load its weights."""
    layout = initialize_layout(run)
    module = build_stage(run, layout.pp_rank)
    placements = parameter_placements(module, layout.layer_offsets(run.model.num_layers))
    tokenizer = tokenizer_of(run.data.path)
    step = load_weights(checkpoint, module, placements, run, tokenizer.fingerprint)
    return Loaded(run, layout, InferenceEngine(module), step)


def same_data(run: RunConfig, checkpoint: Path) -> bool | None:
    """Return whether the training split in data.path is the one that the checkpoint was trained on.

    If it is, the held-out text was not part of the training data. None means that the checkpoint does not record its data.
    """
    saved = None if checkpoint.suffix == SUFFIX else read_state_file(checkpoint).get("dataset_fingerprint")
    return None if saved is None else saved == load_manifest(Path(run.data.path)).splits["train"].fingerprint


def _warn_of_data(run: RunConfig, checkpoint: Path, same: bool | None) -> None:
    if (warning := held_out_warning(run)) is not None:
        print(warning, file=sys.stderr)
    if same is False:
        print(
            f"warning: data.path {run.data.path} holds other training documents than those that checkpoint {checkpoint} was "
            "trained on, so the model may have been trained on this held-out text; give the run's own data with --data.path, "
            "or train on this data in a new run_dir",
            file=sys.stderr,
        )


def evaluate(run: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Measure held-out perplexity by position, print a table, and write evaluation.json to the run directory.

    Returns:
        The contents of evaluation.json. Losses are in nats per token.
    """
    loaded = load_model(run, checkpoint)
    same = same_data(run, checkpoint)
    if loaded.layout.is_main:
        _warn_of_data(run, checkpoint, same)
    with ReadBack(run, loaded.layout, loaded.engine.module) as read_back:
        with_memory = _measure(loaded, run, "kept")
    emptied = shuffled = None
    if state_numbers(run.model):
        emptied = _measure(loaded, run, "emptied")
        shuffled = _measure(loaded, shuffled_run(run, loaded.layout), "shuffled")
    entropy = unigram_entropy(TokenDataset(Path(run.data.path), "held_out"))
    if shuffled is not None and not shuffled.tokens.sum():
        shuffled = None
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "same_data": same,
        "tokens": int(with_memory.tokens.sum()),
        "with_memory": _summary(with_memory, with_memory.loss),
        "memory_emptied": None if emptied is None else _summary(emptied, emptied.loss),
        "memory_shuffled": None if shuffled is None else _summary(shuffled, shuffled.loss),
        # Shuffled memory is not measured for all tokens. Compare its loss with this one, which covers the same tokens.
        "with_memory_where_shuffled": None if shuffled is None else _summary(shuffled, shuffled.own_loss),
        "unigram_entropy": entropy,
        "by_position": _by_position(with_memory, emptied, shuffled),
        "read_back": read_back.result(),
    }
    if loaded.layout.is_main:
        _print_evaluation(report)
        write_json(Path(run.run_dir) / "evaluation.json", report)
    return report


def _measure(loaded: Loaded, run: RunConfig, memory: Treatment) -> HeldOutLoss:
    pipeline = SegmentPipeline(loaded.engine, run, loaded.layout, len(loaded.layout.rows(run.training.rows)))
    with Progress(console=Console(stderr=True), disable=not loaded.layout.is_main or not sys.stderr.isatty()) as progress:
        task = progress.add_task("held-out" if memory == "kept" else f"held-out, memory {memory}", total=None)
        return held_out_loss(
            run, loaded.layout, pipeline, memory=memory, on_batch=lambda count: progress.update(task, completed=count)
        )


def _summary(result: HeldOutLoss, loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": int(result.tokens.sum())}


def _by_position(kept: HeldOutLoss, emptied: HeldOutLoss | None, shuffled: HeldOutLoss | None) -> list[dict[str, Any]]:
    """Return one entry for each range of segments.

    A loss is None if fewer than MEASURED_SHARE of the tokens in the range were measured for it.
    """
    rows = []
    for first, last in position_bins(kept):
        segments = slice(first, None if last is None else last + 1)
        tokens = int(kept.tokens[segments].sum())
        if tokens == 0:
            continue

        def loss(result: HeldOutLoss | None, segments: slice = segments, tokens: int = tokens) -> float | None:
            if result is None or result.tokens[segments].sum() < MEASURED_SHARE * tokens:
                return None
            return float(result.loss_sum[segments].sum() / result.weights[segments].sum())

        rows.append(
            {
                "first_segment": first,
                "last_segment": last,
                "tokens": tokens,
                "loss": loss(kept),
                "loss_memory_emptied": loss(emptied),
                "loss_memory_shuffled": loss(shuffled),
            }
        )
    return rows


def _print_evaluation(report: dict[str, Any]) -> None:
    def shown(loss: float | None) -> str:
        return "-" if loss is None else shown_perplexity(loss, 3)

    def line(name: str, tokens: int, *losses: float | None) -> str:
        return f"{name:>20}  {tokens:>10,}" + "".join(f"  {shown(loss):>12}" for loss in losses)

    print(f"checkpoint {report['checkpoint']}, {report['tokens']:,} held-out tokens")
    print(f"{'segment of document':>20}  {'tokens':>10}  {'with memory':>12}  {'emptied':>12}  {'shuffled':>12}   (perplexity)")
    for row in report["by_position"]:
        losses = (row["loss"], row["loss_memory_emptied"], row["loss_memory_shuffled"])
        first, last = row["first_segment"], row["last_segment"]
        print(line(f"{first}+" if last is None else f"{first}-{last}", row["tokens"], *losses))
    emptied, shuffled = report["memory_emptied"], report["memory_shuffled"]
    print(line("all", report["tokens"], report["with_memory"]["loss"], None if emptied is None else emptied["loss"], None))
    if shuffled is not None:
        own = report["with_memory_where_shuffled"]["loss"]
        print(line("all, where shuffled", shuffled["tokens"], own, None, shuffled["loss"]))
        print(
            f"emptied: the memory is reset at every segment; shuffled: each row reads the memory of another row, measured for "
            f"{shuffled['tokens'] / report['tokens']:.0%} of the tokens; `all, where shuffled` compares both on these tokens"
        )
    if report["read_back"] is not None:
        _print_read_back(report["read_back"])
    loss = report["with_memory"]["loss"]
    print(f"held-out loss {loss:.4f} nats per token; unigram entropy of the held-out text {report['unigram_entropy']:.4f}")


def _print_read_back(read_back: dict[str, Any]) -> None:
    print("cosine between a value and the memory read with its own key, or with the key of another token, mean over layers")
    print(f"{'segments ago':>20}  " + "".join(f"{age:>8}" for age in read_back["ages"]))
    for kind, name in (("own_key", "own key"), ("other_key", "other key")):
        print(f"{name:>20}  " + "".join(f"{sum(layers) / len(layers):>8.3f}" for layers in read_back[kind]))
    if strength := read_back.get("write_strength"):
        print("strength of a write, mean by layer (1 if not learned): " + "  ".join(f"{mean:.3f}" for mean in strength))


def generate(
    run: RunConfig, checkpoint: Path, prompt: str | None, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Continue a prompt with streaming inference, print the text, and write generation.json to the run directory.

    Args:
        prompt: text to continue; None uses the first half of the longest held-out document, at most 32 segments.
        temperature: 0 selects the most likely token.
        top_k: sample from the k most likely tokens; 0 samples from all tokens.
        seed: seed of the sampling.

    Returns:
        The continuation, without the prompt.
    """
    loaded = load_model(run, checkpoint)
    tokenizer = tokenizer_of(run.data.path)
    tokens = _default_prompt(run) if prompt is None else [tokenizer.bos_id, *tokenizer.encode(prompt)]
    model = StreamingModel(loaded.engine.module, run)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading the prompt", total=len(tokens))
        produced = list(
            sample_tokens(
                model,
                tokens,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                stop_token=tokenizer.eos_id,
                on_chunk=lambda position: progress.update(task, completed=position),
            )
        )
    text = tokenizer.decode(produced)
    if loaded.layout.is_main:
        shown = tokenizer.decode(tokens)
        facts = {
            "step": loaded.step,
            "prompt": shown,
            "text": text,
            "prompt_tokens": len(tokens),
            "segments": -(-len(tokens) // run.model.segment_length),
        }
        print(f"--- end of the prompt ({facts['prompt_tokens']} tokens, {facts['segments']} segments) ---")
        print(shown[-400:], end="")
        print("\n--- continuation ---")
        print(text)
        write_json(Path(run.run_dir) / "generation.json", facts)
    return text


def _default_prompt(run: RunConfig) -> list[int]:
    dataset = TokenDataset(Path(run.data.path), "held_out")
    longest = int(dataset.document_lengths.argmax())
    count = min(int(dataset.document_lengths[longest]) // 2, 32 * run.model.segment_length)
    return dataset.read(longest, 0, max(1, count)).tolist()
