"""What is said of a run that does not fit."""

from __future__ import annotations

from infini_train.errors import UserError
from infini_train.planning.plan import Plan
from infini_train.planning.report import GB
from infini_train.planning.search import remedies


def refuse_too_large(planned: Plan) -> None:
    """Say what would make a run fit.

    Raises:
        UserError: the run does not fit.
    """
    if planned.fits:
        return
    memory, changes = planned.memory, remedies(planned)
    largest = max(
        ("weights", "gradients", "optimizer", "activations", "memory_states", "buffers"), key=lambda part: getattr(memory, part)
    )
    part = largest.replace("_", " ")
    raise UserError(
        f"the run needs {memory.total / GB:.1f} GB on a GPU of stage {memory.stage}, but {planned.gpu.name} has "
        f"{planned.usable_memory / GB:.1f} GB to plan with ({part} take {getattr(memory, largest) / GB:.1f} GB); it fits with "
        f"{', or '.join(changes) if changes else 'no layout on any number of GPUs: make the model smaller'}"
    )
