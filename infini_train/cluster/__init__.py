"""Runs on a SLURM cluster: rendering a job, submitting it, looking after it. Imports neither torch nor what needs it."""
