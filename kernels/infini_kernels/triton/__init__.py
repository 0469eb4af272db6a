"""The memory operations as Triton kernels. Imported only where `backend` asks for them: Triton need not be installed."""
