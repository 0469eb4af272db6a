"""Kernels run under Triton's interpreter: on the CPU, and on a machine with a GPU too, where tests/gpu runs them compiled."""

import os

# Before the first import of triton, which reads it once.
os.environ["TRITON_INTERPRET"] = "1"
