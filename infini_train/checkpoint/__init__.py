"""Write, commit, verify and read checkpoint folders. This package knows tensors by name and does not depend on the model."""
