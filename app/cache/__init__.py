"""Answers from before: kept in Redis by tenant and alias, found again by the same words or the same meaning.

partition.py  what may be kept and under which name (pure)
entry.py      what is kept, as bytes
room.py       `Cache`: look, keep, invalidate
"""

from app.cache.entry import Entry
from app.cache.partition import SEMANTIC, Ask, Turn
from app.cache.room import Cache, Seen, Semantic

__all__ = ["SEMANTIC", "Ask", "Cache", "Entry", "Seen", "Semantic", "Turn"]
