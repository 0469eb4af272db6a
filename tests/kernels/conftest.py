"""Run the kernels under Triton's interpreter on the CPU, also on machines with a GPU. tests/gpu runs them compiled."""

import os

# Set before the first import of triton, which reads it once.
os.environ["TRITON_INTERPRET"] = "1"
