"""Accuracy on a retrieval task by length and depth: texts are streamed through the model with carried memory.

Shapes: B rows of this process, N segments of a micro-batch, S segment length, T = N S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from infini_train.config import RunConfig
from infini_train.data.streams import StreamBatch
from infini_train.model.micro_batch import Memory
from infini_train.parallel.layout import Layout, all_reduce_sum
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.tasks import Purpose, Sample, Task, at_depth


@dataclass(frozen=True)
class Cell:
    """Results for one length and depth.

    Attributes:
        token_accuracy: share of the answers' scored tokens that are right when the right ones before them are given (teacher
            forcing), as the paper reports it.
        greedy_token_accuracy: the same when the model goes on from its own most likely tokens.
        exact_match: share of the texts whose answer is right in all scored tokens under greedy decoding.
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
    """One cell; a collective over all processes.

    Args:
        pipeline: built for run.task.rows / data-parallel size rows; all layers are in this process.
        on_tokens: called with the number of positions of a row that were read just now.
    """
    config = run.task
    if run.model.attention != "full":
        # Short texts need no more segments than they have. Full attention's context is the micro-batch, as it was trained.
        segments = min(run.training.segments_per_micro_batch, -(-(length - 1) // run.model.segment_length))
        run = replace(run, training=replace(run.training, segments_per_micro_batch=segments))
    rows = layout.rows(config.rows)
    counts = np.zeros(4)
    for first in range(0, config.samples_per_cell, config.rows):
        numbers = [first + row for row in rows]
        # Seeds by what a cell is, not by its place in a list: another grid measures the same texts.
        samples = [
            task.sample(config.seed, Purpose.EVALUATION, (length, round(depth * 10_000), number), length, at_depth(depth))
            for number in numbers
        ]
        forced, greedy = _answers(run, pipeline, samples, on_tokens)
        for number, sample, by_force, by_greed in zip(numbers, samples, forced, greedy, strict=True):
            if number >= config.samples_per_cell:
                continue  # fills up the rows of the last batch
            right = (by_greed == sample.answer)[sample.scored]
            forced_right = (by_force == sample.answer)[sample.scored].sum()
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
    """The most likely tokens at each answer's places: under teacher forcing, and under greedy decoding.

    The micro-batches that hold answers are read again with what the model said there in place of the answer, until it says the
    same again: since no position sees a later one, that is greedy decoding, in at most one reading a token. A model whose
    forced answer is right needs no second reading.
    """
    T = run.micro_batch_tokens
    last = samples[0].length - 1  # positions with a target; the answer's last token is never read
    # The first answer token is predicted one position before it stands.
    starts = range(0, last, T)
    first = min(sample.answer_start for sample in samples) - 1
    answers_from = first // T
    memory: Memory = {}
    for start in starts[:answers_from]:
        memory, _ = pipeline.predict([_micro_batch(run, samples, start, None)], memory, None)
        on_tokens(T)
    said = [sample.answer for sample in samples]
    forced: list[np.ndarray] | None = None
    while True:
        batches = [_micro_batch(run, samples, start, said) for start in starts[answers_from:]]
        _, predictions = pipeline.predict(batches, memory, first - starts[answers_from])
        found = predictions.cpu().numpy()  # [B, positions from `first` on], what follows each
        now = [found[b, s.answer_start - 1 - first :][: s.answer_length] for b, s in enumerate(samples)]
        forced = forced or now
        # Only what stands before an answer's last token is read again.
        if all(np.array_equal(a[:-1], b[:-1]) for a, b in zip(now, said, strict=True)):
            on_tokens(last - starts[answers_from])
            return forced, now
        said = now


def _micro_batch(run: RunConfig, samples: Sequence[Sample], start: int, said: Sequence[np.ndarray] | None) -> StreamBatch:
    """Positions start .. start + T - 1 of each text, but for its last token; with `said` in place of the answers."""
    S, N = run.model.segment_length, run.training.segments_per_micro_batch
    count = min(N * S, samples[0].length - 1 - start)
    tokens = np.zeros((len(samples), N * S), dtype=np.int64)
    for b, sample in enumerate(samples):
        tokens[b, :count] = sample.read(start, count)
        if said is not None:
            for place, token in enumerate(said[b][:-1], sample.answer_start - start):
                if 0 <= place < count:
                    tokens[b, place] = token
    lengths = np.clip(count - S * np.arange(N), 0, S)
    by_segment = torch.from_numpy(np.tile(lengths, (len(samples), 1)))
    reset = torch.zeros_like(by_segment, dtype=torch.bool)
    reset[:, 0] = start == 0
    shown = torch.from_numpy(tokens)
    return StreamBatch(
        tokens=shown,
        targets=torch.zeros_like(shown),
        loss_mask=torch.zeros(shown.shape),
        lengths=by_segment,
        reset=reset,
        segment_index=start // S + torch.arange(N).expand(len(samples), N),
        draws=torch.zeros(*by_segment.shape, 2, dtype=torch.float64),
        repeats=torch.ones_like(by_segment),
    )
