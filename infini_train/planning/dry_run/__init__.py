"""Run the real code of one rank on tensors without values, and compare it with the plan."""
