"""The training loop with its state, checkpoints, metrics and signals."""
