"""What a run will take, before GPUs are asked for: memory, communication and time from formulas, checked against real runs."""
