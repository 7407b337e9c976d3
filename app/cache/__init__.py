"""Answers from before: kept in Redis by tenant and alias, found again by the same words or the same meaning.

partition.py  what may be kept and under which name (pure)
entry.py      what is kept, as bytes
room.py       `Cache`: look, keep, invalidate
flight.py     one answer on its way to all who asked for the same
once.py       idempotency keys
epochs.py     what has been invalidated
"""

from app.cache.entry import Entry
from app.cache.epochs import INVALIDATED, Scope
from app.cache.flight import Flight
from app.cache.once import Kept, Once, kept, once
from app.cache.partition import SEMANTIC, Ask, Turn
from app.cache.room import Cache, Seen, Semantic

__all__ = [
    "INVALIDATED",
    "SEMANTIC",
    "Ask",
    "Cache",
    "Entry",
    "Flight",
    "Kept",
    "Once",
    "Scope",
    "Seen",
    "Semantic",
    "Turn",
    "kept",
    "once",
]
