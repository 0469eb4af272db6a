"""A Python interpreter that starts with the libraries already imported, for tests that start many processes.

Importing torch, Megatron-core and DeepSpeed takes five seconds of a core, several hundred times in this suite. `server` imports
them once and forks; `client` looks like an interpreter to whoever starts it (the launchers, torchrun): same arguments, files,
environment, signals and exit code. What runs is the same program in a process of its own.
"""
