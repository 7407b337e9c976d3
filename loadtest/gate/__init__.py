"""The pre-ship gate: six gates before a release, each with its threshold. `gateway preship`."""

from loadtest.gate.run import preship

__all__ = ["preship"]
