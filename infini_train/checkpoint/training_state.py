"""The state that training carries from step to step, beside weights and optimizer. A checkpoint saves it with the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from infini_train.data.streams import StreamReader
from infini_train.model.layer_context import Memory


@dataclass
class HealthCounters:
    """Counters of the run's health. Equal on all ranks, and saved in checkpoints."""

    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite. Adam's step count is `TrainingState.step` minus these."""
    consecutive_skips: int = 0
    """Skipped steps since the last step that was not skipped."""
    spikes: int = 0
    """Losses that were spikes."""
    rollbacks: int = 0
    """Rollbacks to a checkpoint because of a spike."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps that were not skipped, oldest first; at most health.spike_window."""

    def state_dict(self) -> dict[str, Any]:
        """Return all counters by name."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the counters from `state_dict`."""
        for name, value in values.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


@dataclass
class TrainingState:
    """The state of a run beside its weights and optimizer."""

    reader: StreamReader
    """Reader of this rank's streams; holds the stream positions."""
    memory: Memory = field(default_factory=dict)
    """Memory of this stage's layers at the streams' current position."""
    step: int = 0
    """Finished steps, including skipped ones: each step has its own data and learning rate."""
    tokens: int = 0
    """Valid tokens trained on, over all rows, without those of skipped steps."""
    health: HealthCounters = field(default_factory=HealthCounters)
