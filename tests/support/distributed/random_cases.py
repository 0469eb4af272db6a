"""Random valid models, batches and layouts, to cover combinations that `cases.py` does not list."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from infini_train.attention import ATTENTION_VARIANTS
from infini_train.config import LayoutConfig, RunConfig
from infini_train.config.validation import validate
from infini_train.runtime.errors import UserError

MAX_PROCESSES = 6
RIVALS = sorted(set(ATTENTION_VARIANTS) - {"infini"})


@dataclass(frozen=True)
class RandomCase:
    """A run on one process and in two layouts; the second resumes from the checkpoint of the first."""

    one: RunConfig
    first: tuple[RunConfig, int]
    """The run in the first layout, and its number of processes."""
    second: tuple[RunConfig, int]
    """The run in the second layout, and its number of processes."""


def random_case(base: RunConfig, seed: int) -> RandomCase:
    """Draw a case. The same seed gives the same case."""
    rng = random.Random(seed)
    while True:
        one = _random_run(base, rng)
        if _is_accepted(one, 1):
            return RandomCase(one, _random_layout(one, rng), _random_layout(one, rng))


def _is_accepted(run: RunConfig, processes: int) -> bool:
    try:
        validate(run, processes)
    except UserError:
        return False
    return True


def _random_run(base: RunConfig, rng: random.Random) -> RunConfig:
    """Draw a model, a batch and an optimizer. The result may be invalid."""
    any_of = rng.choice
    infini = rng.random() < 0.7
    groups, rule = any_of([1, 2, 2, 3, 4, 4]), any_of(["linear", "delta"])
    convolution = any_of([0, 0, 0, 2, 5])
    model = replace(
        base.model,
        attention="infini" if infini else any_of(RIVALS),
        num_layers=any_of([2, 3, 4, 6, 8, 8]),
        hidden_size=any_of([24, 40, 48]),
        num_query_groups=groups,
        num_attention_heads=groups * any_of([1, 2, 3]),
        head_dim=any_of([4, 6, 10, 12]),
        ffn_hidden_size=any_of([36, 80, 96]),
        segment_length=any_of([6, 8, 13, 16, 24]),
        update_rule=rule,
        first_segment=any_of(["paper", "local_only"]),
        write_strength=any_of(["one", "one", "learned"]),
        normaliser=any_of(["paper", "corrected"]) if rule == "delta" else "paper",
        feature_map=any_of(["elu", "elu", "softmax"]),
        short_convolution=convolution,
        short_convolution_reach=any_of(["segment", "document"]) if convolution else "segment",
        initial_gate=any_of([0.0, -2.0, 0.5]),
        bank_tokens=any_of([13, 40, 200]),
        bank_top_k=any_of([3, 32]),
        memory_tokens=any_of([1, 5]),
        tie_embeddings=rng.random() < 0.2,
    )
    training = replace(
        base.training,
        rows=any_of([2, 4, 6]),
        segments_per_micro_batch=any_of([1, 2, 3, 4, 6]),
        micro_batches_per_window=any_of([1, 2, 3, 4]),
        windows_per_step=any_of([1, 1, 2, 3]),
        seed=rng.randrange(1000),
        length_curriculum=any_of([0.0, 0.0, 0.3, 1.0]),
        memory_ageing=any_of([1, 1, 30]) if infini else 1,
        memory_ageing_rise=any_of([0.0, 0.6]),
    )
    optimizer = replace(
        base.optimizer,
        schedule=any_of(["cosine", "wsd"]),
        decay_steps=3,
        warmup_steps=any_of([0, 2]),
        clip_grad_norm=any_of([0.0, 0.05, 0.5]),
        weight_decay=any_of([0.0, 0.1]),
        gate_weight_decay=any_of([0.0, 0.1]),
        # Without clipping, gradients and their rounding errors are larger than in the base run, so ε must be larger too.
        eps=1e-3,
    )
    return replace(base, model=model, training=training, optimizer=optimizer)


def _random_layout(one: RunConfig, rng: random.Random) -> tuple[RunConfig, int]:
    """Draw a valid layout for the run, and return the run and its number of processes."""
    while True:
        training = replace(
            one.training,
            recompute=rng.choice(["none", "layer", "stage"]),
            recompute_layers=rng.choice([0, 0, 1, 2]),
            loss_chunk_tokens=rng.choice([7, 20, 1024]),
        )
        candidates = [(replace(one, layout=layout, training=training), processes) for layout, processes in LAYOUTS]
        accepted = [candidate for candidate in candidates if _is_accepted(*candidate)]
        if accepted:
            # Draw the model split first, so that a split's frequency does not depend on its number of ZeRO stages and rows.
            split = rng.choice(sorted({_split(run.layout) for run, _ in accepted}))
            return rng.choice([candidate for candidate in accepted if _split(candidate[0].layout) == split])


def _split(layout: LayoutConfig) -> tuple[int, ...]:
    tensor = layout.tensor_parallel_size, int(layout.sequence_parallel)
    return *tensor, layout.context_parallel_size, layout.pipeline_parallel_size, layout.virtual_stages


def _layouts() -> Iterator[tuple[LayoutConfig, int]]:
    """Iterate over layouts with at least two processes; otherwise the simplest layouts would be drawn most often."""
    values = product((1, 2, 4), (False, True), (1, 2, 3), (1, 2, 3, 4), (1, 2), range(4), (False, True), (1, 2, 3))
    for tp, sequence_parallel, cp, pp, virtual, zero, offload, dp in values:
        layout = LayoutConfig(
            tensor_parallel_size=tp,
            sequence_parallel=sequence_parallel,
            context_parallel_size=cp,
            pipeline_parallel_size=pp,
            virtual_stages=virtual,
            zero_stage=zero,
            offload_optimizer=offload,
        )
        if 2 <= (processes := dp * layout.model_processes) <= MAX_PROCESSES:
            yield layout, processes


LAYOUTS = list(_layouts())
