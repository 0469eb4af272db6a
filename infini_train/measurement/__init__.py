"""Measure a model: perplexity, retrieval, memory read-back and generation."""
