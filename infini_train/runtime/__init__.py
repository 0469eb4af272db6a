"""Errors, device, signals, files and streams: what every process needs, without torch where possible."""
