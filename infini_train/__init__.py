"""infini_train: train Infini-attention language models on very long token streams."""

__version__ = "0.1.0"
