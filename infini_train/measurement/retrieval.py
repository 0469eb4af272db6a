"""Accuracy on a retrieval task by text length and depth. Texts are streamed through the model with carried memory.

Shapes: B rows of this process, N segments of a micro-batch, S segment length, T = N S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from infini_train.config import RunConfig
from infini_train.data.streams import Batch
from infini_train.model.layer_context import Memory
from infini_train.parallel.layout import Layout, all_reduce_sum
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.tasks import Purpose, Sample, Task, at_depth


@dataclass(frozen=True)
class Cell:
    """Results for one length and depth.

    Attributes:
        length: tokens of a text.
        depth: position of the fact, from 0 (start of the text) to 1 (directly before the question).
        samples: number of texts.
        token_accuracy: fraction of the scored answer tokens predicted correctly when the correct earlier answer tokens are
            given (teacher forcing), as the paper reports it.
        greedy_token_accuracy: the same under greedy decoding, where the model continues from its own most likely tokens.
        exact_match: fraction of the texts whose scored answer tokens are all correct under greedy decoding.
        seed: seed of the texts.
    """

    length: int
    depth: float
    samples: int
    token_accuracy: float
    greedy_token_accuracy: float
    exact_match: float
    seed: int


def measure_cell(
    run: RunConfig,
    layout: Layout,
    pipeline: SegmentPipeline,
    task: Task,
    length: int,
    depth: float,
    on_tokens: Callable[[int], None],
) -> Cell:
    """Measure one cell. A collective over all processes.

    Args:
        pipeline: built for run.task.rows / data-parallel size rows, with all layers in this process.
        on_tokens: called with the number of positions per row read since the last call.
    """
    config = run.task
    if run.model.attention != "full":
        # Shrink micro-batches to the length of short texts. Full attention keeps the size of training, because the micro-batch
        # is its context.
        segments = min(run.training.segments_per_micro_batch, -(-(length - 1) // run.model.segment_length))
        run = replace(run, training=replace(run.training, segments_per_micro_batch=segments))
    rows = layout.rows(config.rows)
    counts = np.zeros(4)
    for first in range(0, config.samples_per_cell, config.rows):
        numbers = [first + row for row in rows]
        # The seed depends on length and depth, not on the index in the grid, so that every grid measures the same texts.
        samples = [
            task.sample(config.seed, Purpose.EVALUATION, (length, round(depth * 10_000), number), length, at_depth(depth))
            for number in numbers
        ]
        forced, greedy = _answers(run, pipeline, samples, on_tokens)
        for number, sample, forced_tokens, greedy_tokens in zip(numbers, samples, forced, greedy, strict=True):
            if number >= config.samples_per_cell:
                continue  # only fills the rows of the last batch
            right = (greedy_tokens == sample.answer)[sample.scored]
            forced_right = (forced_tokens == sample.answer)[sample.scored].sum()
            counts += np.array([sample.scored.sum(), forced_right, right.sum(), right.all()], dtype=float)
    if layout.tp_rank != 0:
        counts[:] = 0
    tokens, forced_sum, greedy_sum, exact = all_reduce_sum(counts.tolist())
    return Cell(
        length,
        depth,
        config.samples_per_cell,
        forced_sum / tokens,
        greedy_sum / tokens,
        exact / config.samples_per_cell,
        config.seed,
    )


def _answers(
    run: RunConfig, pipeline: SegmentPipeline, samples: Sequence[Sample], on_tokens: Callable[[int], None]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the most likely tokens at the positions of each answer, under teacher forcing and under greedy decoding.

    The micro-batches that contain answers are read again with the predicted tokens in place of the answer, until the
    predictions no longer change. Attention is causal, so the fixed point is the greedy decoding. It takes at most one pass per
    answer token. If the answer under teacher forcing is correct, one pass is enough.

    Returns:
        Predictions under teacher forcing and under greedy decoding, one array [answer_length] for each sample.
    """
    T = run.micro_batch_tokens
    last = samples[0].length - 1  # positions with a target; the last answer token is never an input
    # Each token is predicted at the position before it.
    starts = range(0, last, T)
    first = min(sample.answer_start for sample in samples) - 1
    answers_from = first // T
    memory: Memory = {}
    for start in starts[:answers_from]:
        memory, _ = pipeline.predict([_micro_batch(run, samples, start, None)], memory, None)
        on_tokens(T)
    answers = [sample.answer for sample in samples]
    forced: list[np.ndarray] | None = None
    while True:
        batches = [_micro_batch(run, samples, start, answers) for start in starts[answers_from:]]
        _, predictions = pipeline.predict(batches, memory, first - starts[answers_from])
        found = predictions.cpu().numpy()  # [B, positions from `first` on]: the predicted next tokens
        predicted = [found[b, s.answer_start - 1 - first :][: s.answer_length] for b, s in enumerate(samples)]
        forced = forced or predicted
        # The last answer token is never an input, so it cannot change the predictions.
        if all(np.array_equal(a[:-1], b[:-1]) for a, b in zip(predicted, answers, strict=True)):
            on_tokens(last - starts[answers_from])
            return forced, predicted
        answers = predicted


def _micro_batch(run: RunConfig, samples: Sequence[Sample], start: int, answers: Sequence[np.ndarray] | None) -> Batch:
    """Return positions start .. start + T - 1 of each text as a micro-batch.

    The last token of a text is left out, because it has no target.

    Args:
        answers: answer tokens to insert; None keeps the true answers.
    """
    S, N = run.model.segment_length, run.training.segments_per_micro_batch
    count = min(N * S, samples[0].length - 1 - start)
    tokens = np.zeros((len(samples), N * S), dtype=np.int64)
    for b, sample in enumerate(samples):
        tokens[b, :count] = sample.read(start, count)
        if answers is not None:
            for place, token in enumerate(answers[b][:-1], sample.answer_start - start):
                if 0 <= place < count:
                    tokens[b, place] = token
    lengths = np.clip(count - S * np.arange(N), 0, S)
    by_segment = torch.from_numpy(np.tile(lengths, (len(samples), 1)))
    reset = torch.zeros_like(by_segment, dtype=torch.bool)
    reset[:, 0] = start == 0
    shown = torch.from_numpy(tokens)
    return Batch(
        tokens=shown,
        targets=torch.zeros_like(shown),
        loss_mask=torch.zeros(shown.shape),
        lengths=by_segment,
        reset=reset,
        segment_index=start // S + torch.arange(N).expand(len(samples), N),
        draws=torch.zeros(*by_segment.shape, 2, dtype=torch.float64),
        repeats=torch.ones_like(by_segment),
    )
