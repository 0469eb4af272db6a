"""Text to token streams: documents, tokenizer, shards, index, streams.

Only `streams` needs torch; the rest can refuse bad input before torch is imported, so this file imports nothing.
"""
