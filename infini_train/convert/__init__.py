"""Models of Hugging Face transformers to start from, and trained ones for it."""
