"""Requests per second on one core, added latency and memory, with everything on: `python -m loadtest.bench`."""
