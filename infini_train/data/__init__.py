"""Text to token streams: documents, tokenizer, shards, index, streams.

Only `streams` needs torch. The other modules refuse bad input before torch is imported, so this file imports nothing.
"""
