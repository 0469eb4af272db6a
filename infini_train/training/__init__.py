"""The training loop and what it carries: state, checkpoints, metrics, signals."""
