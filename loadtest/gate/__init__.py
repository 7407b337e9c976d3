"""The pre-ship gate: six gates before a release, each with its threshold. `gateway preship`, `gateway drill`."""

from loadtest.gate.run import drill, preship

__all__ = ["drill", "preship"]
