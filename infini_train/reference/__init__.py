"""The plain PyTorch model that defines a training run's results."""
