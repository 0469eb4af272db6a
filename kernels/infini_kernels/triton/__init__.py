"""Triton kernels of the memory operations. Imported only if `backend` selects them, so that Triton is optional."""
