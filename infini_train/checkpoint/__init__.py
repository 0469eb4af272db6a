"""Checkpoint folders: how they are written, committed, verified and read. Knows tensors by name, and nothing of the model."""
