"""Evaluation of a trained model: perplexity, retrieval accuracy, generation, comparison of variants, and the HTML report."""
