"""Everything that training carries from step to step beside the weights; a checkpoint saves exactly this and the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from infini_train.data.streams import StreamReader
from infini_train.model.micro_batch import Memory


@dataclass
class TrainingState:
    """The visible state of a run."""

    reader: StreamReader
    """Where each of this process's streams stands."""
    memory: Memory = field(default_factory=dict)
    """Memory of this stage's layers at the streams' current position."""
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Valid tokens trained on, over all rows."""
