"""Detect and survive failures: watchdog, run lock, stop requests and training health."""
