"""The limits of one process while Redis is away: each replica admits its share of a limit by its own counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from msgspec import Struct

from app.limits.scopes import BUDGETS, MOST, WINDOW_SECONDS, WINDOWS, Limit, Scope


class _Window:
    """The amounts of the current second and the sixty before it, as reserve.lua counts them."""

    __slots__ = ("slots", "sum")

    def __init__(self) -> None:
        self.slots: deque[list[int]] = deque()
        self.sum = 0

    def forget(self, second: int) -> None:
        while self.slots and self.slots[0][0] <= second - WINDOW_SECONDS:
            self.sum -= self.slots.popleft()[1]

    def add(self, second: int, amount: int) -> None:
        self.sum += amount
        if self.slots and self.slots[-1][0] >= second:
            self.slots[-1][1] += amount
        else:
            self.slots.append([second, amount])

    def give_back(self, second: int, amount: int) -> None:
        for slot in self.slots:
            if slot[0] == second:
                amount = min(amount, slot[1])
                slot[1] -= amount
                self.sum -= amount

    def wait_seconds(self, lacks: int, second: int) -> int:
        """Until as much has left as is lacking; the whole window where even that is too little."""
        for at, amount in self.slots:
            lacks -= amount
            if lacks <= 0:
                return at + WINDOW_SECONDS - second
        return WINDOW_SECONDS


class _Budget(Struct):
    """What this process may spend of a budget, and has."""

    share: int
    used: int = 0


class Share:
    """Counts every limit of the calls that it is asked for; refuses by those whose policy is `local_share`.

    The share of a rate is the limit through the number of replicas, at least 1. That of a budget is what was left when
    this process last heard of it, through the number of replicas; of one that it never heard of, the whole is taken
    to be left.
    """

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}
        self._budgets: dict[str, _Budget] = {}

    def left(
        self,
        scope: Scope,
        replicas: int,
        running: Mapping[str, Collection[str]],
        heard: Mapping[str, int],
        second: int,
    ) -> list[int]:
        """What is left of this process's share of each limit; more than any call takes where the policy is `open`."""
        return [
            self._left(limit, replicas, running, heard, second) if limit.away == "local_share" else MOST
            for limit in scope.limits
        ]

    def _left(
        self,
        limit: Limit,
        replicas: int,
        running: Mapping[str, Collection[str]],
        heard: Mapping[str, int],
        second: int,
    ) -> int:
        if limit.kind in BUDGETS:
            budget = self._budgets.get(limit.key)
            if budget is None:
                share = max(0, heard.get(limit.key, limit.value)) // replicas
                budget = self._budgets[limit.key] = _Budget(share)
            return budget.share - budget.used
        share = max(1, limit.value // replicas)
        if limit.kind == "concurrency":
            return share - len(running.get(limit.key, ()))
        window = self._windows.setdefault(limit.key, _Window())
        window.forget(second)
        return share - window.sum

    def waits_ms(self, scope: Scope, left: list[int], tokens: int, nanos: int, second: int) -> list[int]:
        """As reserve.lua says it: of each window that is in the way, how long until its share has room."""
        waits_ms = []
        for limit, remaining in zip(scope.limits, left, strict=True):
            amount = limit.amount(tokens, nanos)
            if amount <= remaining:
                waits_ms.append(-1)
            elif limit.kind in WINDOWS:
                waits_ms.append(self._windows[limit.key].wait_seconds(amount - remaining, second) * 1000)
            else:
                waits_ms.append(0)
        return waits_ms

    def take(self, scope: Scope, tokens: int, nanos: int, second: int) -> None:
        for limit in scope.limits:
            amount = limit.amount(tokens, nanos)
            if limit.kind in WINDOWS:
                self._windows.setdefault(limit.key, _Window()).add(second, amount)
            elif (budget := self._budgets.get(limit.key)) is not None:
                budget.used += amount

    def correct(self, scope: Scope, tokens: int, nanos: int, taken: int, second: int) -> None:
        """`tokens` and `nanos` more than were taken in the second `taken`; below zero for less."""
        for limit in scope.limits:
            if limit.kind == "tpm" and tokens > 0:
                self._windows.setdefault(limit.key, _Window()).add(second, tokens)
            elif limit.kind == "tpm" and limit.key in self._windows:
                self._windows[limit.key].give_back(taken, -tokens)
            elif limit.kind in BUDGETS and (budget := self._budgets.get(limit.key)) is not None:
                budget.used += limit.amount(tokens, nanos)

    def end(self, heard: dict[str, int], second: int) -> None:
        """Redis has the budgets again: what was spent of them here is heard of, and the next share is a new one."""
        for key, budget in self._budgets.items():
            if key in heard:
                heard[key] -= budget.used
        self._budgets.clear()
        for key, window in list(self._windows.items()):
            window.forget(second)
            if not window.slots:
                del self._windows[key]
