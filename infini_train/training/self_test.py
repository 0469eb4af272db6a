"""Self-test at the start of a run: train a tiny model in the run's layout and compare it with plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from infini_train.config import ModelConfig, RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.model.gpt import DTYPES
from infini_train.model.parameter_placement import ParameterPlacement, initial_value
from infini_train.parallel.deepspeed.optimizer_state import read_optimizer_state
from infini_train.parallel.layout import initialize_process_group
from infini_train.reference.plain_model import train_plainly
from infini_train.resilience.stop_request import StopRequest
from infini_train.runtime.errors import AgreedError
from infini_train.training.step import train_step
from infini_train.training.training_run import TrainingRun, build_training_run

STEPS = 2


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding explains."""

    loss: float
    """Relative difference."""
    grad_norm: float
    """Relative difference."""
    weights: float
    """L2 norm of a parameter's difference, divided by the L2 norm of its change over all steps."""


TOLERANCES = {"float32": Tolerance(1e-4, 1e-4, 1e-3), "bfloat16": Tolerance(2e-3, 1e-2, 0.2)}
"""By precision. In bfloat16, Adam's first steps amplify the rounding of small gradients: differences of 0.1 of a weight's
change were seen. A weight that is not updated differs by 1."""


class RandomDocuments(TokenDataset):
    """Documents of random tokens, short enough that some end inside every window, with random loss weights."""

    weighted = True

    def __init__(self, vocab_size: int, segment_length: int, documents: int, seed: int) -> None:
        self.path, self.split = Path("self-test"), "train"
        self.vocab_size = vocab_size
        self.tokenizer_fingerprint = "self-test"
        generator = np.random.default_rng(seed)
        self.document_lengths = generator.integers(2, 4 * segment_length, documents)
        self.available = np.ones(documents, dtype=bool)
        self._tokens = [generator.integers(0, vocab_size, length) for length in self.document_lengths]
        # Random weights, because ranks with equal token counts and equal weights would hide a wrong mean.
        self._weights = [generator.choice(np.array([0.25, 1.0], dtype=np.float32), length) for length in self.document_lengths]

    @property
    def num_documents(self) -> int:
        return len(self._tokens)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        return self._tokens[document][start : start + count]

    def read_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return self._weights[document][start : start + count]

    def close(self) -> None:
        pass


def tiny_run(run: RunConfig, data_parallel_size: int, precision: Literal["float32", "bfloat16"] = "float32") -> RunConfig:
    """Return a run with the smallest model that the run's layout divides, and with the run's attention and options."""
    layout, model = run.layout, run.model
    tp, cp = layout.tensor_parallel_size, layout.context_parallel_size
    return replace(
        run,
        model=ModelConfig(
            attention=model.attention,
            num_layers=layout.num_virtual_stages,
            hidden_size=24,
            num_attention_heads=2 * tp,
            num_query_groups=tp,
            head_dim=8,
            ffn_hidden_size=16 * tp,
            segment_length=8 * tp,
            update_rule=model.update_rule,
            first_segment=model.first_segment,
            write_strength=model.write_strength,
            normaliser=model.normaliser,
            feature_map=model.feature_map,
            short_convolution=model.short_convolution and 3,
            short_convolution_reach=model.short_convolution_reach,
            initial_gate=0.5,
            bank_tokens=20,
            bank_top_k=3,
            memory_tokens=3,
            tie_embeddings=model.tie_embeddings,
        ),
        data=replace(run.data, vocab_size=16 * tp),
        training=replace(
            run.training,
            steps=STEPS,
            rows=2 * data_parallel_size,
            segments_per_micro_batch=cp,
            micro_batches_per_window=3,
            windows_per_step=2,
            precision=precision,
        ),
        optimizer=replace(run.optimizer, warmup_steps=0, schedule="cosine", learning_rate=1e-2, eps=1e-5, clip_grad_norm=0.1),
    )


def self_test(run: RunConfig) -> None:
    """Train a tiny model for two steps in the run's layout and compare it with plain torch. Skipped with a single process.

    The test compares the loss and gradient norm of both steps, and every weight after the last step. A run in bfloat16 is
    tested twice: in float32, where rounding hides no error, and in bfloat16, for which DeepSpeed uses another optimizer.

    A collective over all ranks.

    Raises:
        AgreedError: this layout does not compute the same run as one process; names the first value that differs.
    """
    initialize_process_group()
    if dist.get_world_size() == 1:
        return
    _test_precision(run, "float32")
    if run.training.precision != "float32":
        _test_precision(run, run.training.precision)


def _test_precision(run: RunConfig, precision: Literal["float32", "bfloat16"]) -> None:
    tiny = tiny_run(run, run.data_parallel_size(dist.get_world_size()), precision)
    dataset = RandomDocuments(tiny.data.vocab_size, tiny.model.segment_length, 8 * tiny.training.rows, run.training.seed)
    training = build_training_run(tiny, dataset)
    records = [train_step(training, StopRequest())[0] for _ in range(STEPS)]
    difference = _first_difference(training, dataset, records, TOLERANCES[precision])
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, difference)
    named = next((name for name in found if name is not None), None)
    if named is not None:
        raise AgreedError(
            f"self-test: under layout {run.layout} in {precision}, {named}; these processes would train another run than one "
            "process does: use another layout, or training.self_test false to go on at your own risk"
        )


def _first_difference(
    training: TrainingRun, dataset: TokenDataset, records: list[dict[str, float]], tolerance: Tolerance
) -> str | None:
    run, layout = training.run, training.layout
    # In bfloat16 the initial weights are rounded. For large weights the rounding exceeds the change of two steps.
    dtype = DTYPES[run.training.precision]
    initial = {
        name: initial_value(placement, run.model, run.training.seed).to(dtype).float()
        for name, placement in _all_placements(training)
    }
    expected = train_plainly(run, dataset, initial, STEPS)
    for step, record in enumerate(records):
        for name in ("loss", "grad_norm"):
            ours, theirs = record[name], expected[name][step]
            if not abs(ours - theirs) <= getattr(tolerance, name) * abs(theirs):
                return f"{name} of step {step + 1} is {ours:.6g} instead of {theirs:.6g}"
    weights = read_optimizer_state(training.engine)["model"]
    for name, placement in training.checkpointer.placements.items():
        theirs = placement.slice(expected["weights"][placement.name])
        change = theirs - placement.slice(initial[placement.name])
        share = float((weights[name].cpu() - theirs).norm()) / (float(change.norm()) or 1.0)
        if not share <= tolerance.weights:
            return f"parameter {placement.name} differs by {share:.2g} of its change on rank {layout.rank}"
    return None


def _all_placements(training: TrainingRun) -> list[tuple[str, ParameterPlacement]]:
    """Gather the parameter placements of all pipeline stages."""
    gathered: list[dict[str, ParameterPlacement]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, {p.name: p for p in training.checkpointer.placements.values()})
    return list({name: placement for stage in gathered for name, placement in stage.items()}.items())
