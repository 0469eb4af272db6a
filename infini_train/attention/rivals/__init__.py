"""Other attentions with the same interface, for comparison with Infini-attention."""
