"""Conversion between Hugging Face transformers models and weights of this package."""
