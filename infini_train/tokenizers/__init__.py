"""Tokenizers: the interface, SentencePiece, Hugging Face, and reading one from a file."""
