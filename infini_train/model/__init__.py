"""The GPT that Megatron-core builds around our attention."""
