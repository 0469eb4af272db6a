"""A Python interpreter that starts with the libraries already imported, for tests that start many processes.

Importing torch, Megatron-core and DeepSpeed takes five seconds of one core, and this suite needs it several hundred times.
`server` imports them once and forks. `client` behaves like an interpreter to the launchers and torchrun: same arguments, files,
environment, signals and exit code. Each program still runs in a process of its own.
"""
