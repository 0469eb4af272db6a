"""SLURM support: render, submit, watch and cancel jobs.

This package imports neither torch nor modules that need it.
"""
