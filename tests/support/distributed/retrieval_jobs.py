"""Jobs that the ranks of tests/distributed/test_retrieval.py run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infini_train.config import RunConfig
from infini_train.data.task_samples import make_filler
from infini_train.measurement.generation import StreamingModel, sample_tokens
from infini_train.measurement.retrieval import _answers, measure_cell
from infini_train.parallel.deepspeed.engine import InferenceEngine
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.tasks import Purpose, Task, at_depth
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from infini_train.training.training_run import TrainingRun, build_training_run


def _parts(run: RunConfig) -> tuple[TrainingRun, SegmentPipeline, Task]:
    training = build_training_run(run)
    tokenizer = SentencePieceTokenizer(Path(run.data.path) / "tokenizer.model")
    pipeline = SegmentPipeline(InferenceEngine(training.engine.module), run, training.layout, run.task.rows)
    return training, pipeline, Task(run.task, tokenizer, make_filler(run, tokenizer, held_out=True))


def answers(run: RunConfig, lengths: list[int]) -> dict[str, Any]:
    """Return answers under both decodings, computed in micro-batches and by the streaming model token by token."""
    training, pipeline, task = _parts(run)
    ours, expected, truth, starts = [], [], [], set()
    for length in lengths:
        samples = [task.sample(5, Purpose.EVALUATION, (length, n), length, at_depth(n / 4)) for n in range(4)]
        read: list[int] = []
        ours += [(f.tolist(), g.tolist()) for f, g in zip(*_answers(run, pipeline, samples, read.append), strict=True)]
        assert sum(read) == length - 1, "progress must end at 100%"
        for sample in samples:
            tokens, start = sample.tokens.tolist(), sample.answer_start
            logits = torch.cat(list(StreamingModel(training.engine.module, run).feed(torch.tensor([tokens]))), dim=1)
            forced = logits[0, start - 1 : -1].argmax(dim=-1).tolist()
            model = StreamingModel(training.engine.module, run)
            greedy = list(
                sample_tokens(model, tokens[:start], sample.answer_length, temperature=0, top_k=0, seed=0, stop_token=-1)
            )
            expected.append((forced, greedy))
            truth.append(sample.answer.tolist())
            starts.add(start)
    return {"ours": ours, "expected": expected, "truth": truth, "starts": starts}


def cell_with_known_errors(run: RunConfig, length: int, wrong_rows: int) -> dict[str, Any]:
    """Measure a cell with a fake pipeline that predicts the true next tokens, except the second answer token of some rows.

    Args:
        wrong_rows: number of first texts with a wrong second answer token.
    """
    training, _, task = _parts(run)
    samples = [
        task.sample(run.task.seed, Purpose.EVALUATION, (length, 0, number), length, at_depth(0.0))
        for number in range(run.task.samples_per_cell)
    ]

    here = training.layout.rows(len(samples))

    class FakePipeline:
        """Replacement of the pipeline. After a wrong token it predicts only wrong tokens."""

        def predict(self, batches: list[Any], memory: Any, first: int | None) -> Any:
            if first is None:
                return memory, None
            start = int(batches[0].segment_index[0, 0]) * run.model.segment_length + first
            rows = []
            for number in here:
                sample = samples[number]
                right = torch.from_numpy(sample.read(start + 1, length - 1 - start)).clone()
                shown = torch.cat([b.tokens[number - here[0]][: int(b.lengths[0].sum())] for b in batches])[first:]
                place = sample.answer_start - 1 - start
                if number < wrong_rows:
                    right[place + 1] = -1
                    if bool((shown[place + 2 :] != torch.from_numpy(sample.answer[1:-1])).any()):
                        right[place + 2 :] = -1
                rows.append(right)
            return memory, torch.stack(rows)

    run = replace(run, task=replace(run.task, rows=run.task.samples_per_cell))
    return vars(measure_cell(run, training.layout, FakePipeline(), task, length, 0.0, lambda count: None))  # type: ignore[arg-type]
