"""Measuring a trained model: perplexity, generation, and the report that shows a run."""
