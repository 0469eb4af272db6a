"""Build the components of a run in the order of their dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from infini_train.checkpoint.checkpointer import Checkpointer
from infini_train.checkpoint.training_state import TrainingState
from infini_train.config import RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.data.streams import StreamReader
from infini_train.model.gpt import build_stage
from infini_train.model.parameter_placement import initialize_parameters, parameter_placements
from infini_train.parallel.deepspeed.engine import Engine
from infini_train.parallel.deepspeed.optimizer_state import initialize_moments
from infini_train.parallel.layout import Layout, initialize_layout
from infini_train.parallel.pipeline import SegmentPipeline
from infini_train.runtime import platform


@dataclass
class TrainingRun:
    """The components of a run that is ready to train or evaluate."""

    run: RunConfig
    layout: Layout
    engine: Engine
    pipeline: SegmentPipeline
    checkpointer: Checkpointer
    state: TrainingState
    held_out: TokenDataset | None = None
    """The held-out split. Opened once, so that a later `prepare` into data.path does not change what a run evaluates."""


def build_training_run(run: RunConfig, dataset: TokenDataset | None = None) -> TrainingRun:
    """Create process groups, model, optimizer, pipeline and streams from a validated configuration.

    Args:
        dataset: training data; None opens the training split of data.path.
    """
    torch.manual_seed(run.training.seed)
    platform.set_deterministic(run.training.deterministic)
    layout = initialize_layout(run)
    if dataset is None:
        dataset = TokenDataset(Path(run.data.path), "train")
    rows = layout.rows(run.training.rows)
    reader = StreamReader(
        dataset,
        rows,
        run.training.rows,
        run.model.segment_length,
        run.training.seed,
        length_curriculum=run.training.length_curriculum,
    )
    module = build_stage(run, layout.pp_rank)
    placements = parameter_placements(module, layout.layer_offsets(run.model.num_layers))
    initialize_parameters(module, placements, run.model, run.training.seed)
    engine = Engine(module, run, len(rows))
    initialize_moments(engine)
    return TrainingRun(
        run=run,
        layout=layout,
        engine=engine,
        pipeline=SegmentPipeline(engine, run, layout, len(rows)),
        checkpointer=Checkpointer(run, layout, placements, dataset.tokenizer_fingerprint),
        state=TrainingState(reader),
    )
