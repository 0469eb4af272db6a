"""Benchmarks of speed and memory. Records with device, versions and commit are in results/."""
