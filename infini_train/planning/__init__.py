"""Estimates of GPU memory, communication and step time before a run starts. Tests check the formulas against real runs."""
