"""The room of answers from before, as the journey sees it: `ask`, `look`, `keep`."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec import Struct

from app.cache.entry import Entry
from app.cache.partition import Ask


class Seen(Struct, frozen=True):
    """What a look for questions that mean the same found.

    `entry` and its exact `key` where an answer is to be served, with its `similarity`; None: ask the vendor. `notes`
    are the finder's own, for `Semantic.observe`.
    """

    entry: Entry | None = None
    key: str = ""
    similarity: float | None = None
    notes: Any = None


class Semantic(Protocol):
    """Who finds questions that mean the same. `ask.turn.text` is the question, `ask.partition` where it may look."""

    async def find(self, ask: Ask) -> Seen:
        """One round trip, within its own deadline. Never raises: what fails is a miss."""

    def observe(self, ask: Ask, seen: Seen | None, key: str, entry: Entry) -> None:
        """The vendor answered what was not served: `entry` is on its way to Redis under `key`. Never waits or raises.

        Every miss that had a neighbour shows here whether the neighbour's answer would have been right.
        """

    def reverified(self, ask: Ask, seen: Seen, entry: Entry) -> None:
        """What the vendor says to a question that was answered by `seen`: `entry` is not kept."""

    def forget(self, tenant_id: str, alias: str | None) -> None:
        """What is kept of a tenant (an alias of its) is deleted. Never waits or raises."""


class Cache:
    """Answers from before."""

    def __init__(self, semantic: Semantic | None = None) -> None:
        self.semantic = semantic
