"""Everything that training carries from step to step beside the weights; a checkpoint saves exactly this and the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from infini_train.data.streams import StreamReader
from infini_train.model.micro_batch import Memory


@dataclass
class HealthCounters:
    """What the run remembers about its own health. The same on all processes, and kept in checkpoints."""

    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite; Adam has taken `TrainingState.step` minus these."""
    consecutive_skips: int = 0
    """Steps skipped since the last one that was not."""
    spikes: int = 0
    """Losses that stood out of their window."""
    rollbacks: int = 0
    """Returns to a checkpoint because of a spike."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the newest steps that were not skipped, oldest first, at most health.spike_window."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and one list of numbers by name."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, value in values.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


@dataclass
class TrainingState:
    """The visible state of a run."""

    reader: StreamReader
    """Where each of this process's streams stands."""
    memory: Memory = field(default_factory=dict)
    """Memory of this stage's layers at the streams' current position."""
    step: int = 0
    """Steps done, skipped ones included: each has its data and its learning rate."""
    tokens: int = 0
    """Valid tokens trained on, over all rows; those of skipped steps do not count."""
    health: HealthCounters = field(default_factory=HealthCounters)
