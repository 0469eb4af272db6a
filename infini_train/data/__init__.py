"""Data pipeline: documents, tokenizer, shards, index and streams.

Only `streams` imports torch. The other modules can refuse bad input before torch is imported, so this file imports nothing.
"""
