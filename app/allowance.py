"""What part of the traffic may be asked once more: earned by calls, spent by retries and hedges."""

from __future__ import annotations

from app.ambient import Ambient

MOST = 100.0
"""What can be saved up: an outage after a quiet hour is not answered by a storm."""
ROUNDING = 1e-9
"""Ten times a tenth is a little less than one."""


class Allowance:
    """A balance of requests. Calls earn a share of one each; a few a second are there for a process with few calls."""

    def __init__(self, ambient: Ambient, balance: float, per_second: float = 0.0) -> None:
        self._ambient = ambient
        self._per_second = per_second
        self._least = balance
        self._spent_at = ambient.monotonic()
        self.balance = balance

    def earn(self, percent: float) -> None:
        """A call has come."""
        if self.balance < MOST:
            self.balance += percent / 100

    def has(self) -> bool:
        """Whether there is enough for one request."""
        if self._per_second and self.balance < self._least:
            now = self._ambient.monotonic()
            self.balance = min(self._least, self.balance + (now - self._spent_at) * self._per_second)
            self._spent_at = now
        return self.balance >= 1.0 - ROUNDING

    def spend(self) -> bool:
        """Takes one request off, if there is enough for it."""
        if not self.has():
            return False
        self._spent_at = self._ambient.monotonic()
        self.balance -= 1.0
        return True
