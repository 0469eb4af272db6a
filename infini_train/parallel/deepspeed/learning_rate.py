"""Learning rate schedule of a run."""

from __future__ import annotations

import math

from infini_train.config import OptimizerConfig


def learning_rate_factor(optimizer: OptimizerConfig, total_steps: int, step: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    The rate rises linearly over `warmup_steps`. With `cosine` it then decays to `final_learning_rate_fraction`. With `wsd`
    (warm-up, stable, decay) it stays at the peak and decays linearly over the last `decay_steps`. Both reach the final rate at
    the last step.

    Args:
        step: 0-based number of the step.
    """
    final = optimizer.final_learning_rate_fraction
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "wsd":
        remaining = total_steps - 1 - step  # steps after this one
        if remaining >= optimizer.decay_steps:
            return 1.0
        return final + (1.0 - final) * remaining / optimizer.decay_steps
    decay = total_steps - 1 - optimizer.warmup_steps
    progress = min(1.0, (step - optimizer.warmup_steps) / decay) if decay else 1.0
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
