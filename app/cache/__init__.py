"""Answers from before: kept in Redis by tenant and alias, found again by the same words or the same meaning.

partition.py  what may be kept and under which name (pure)
entry.py      what is kept, as bytes
room.py       `Cache`: look, keep, invalidate
flight.py     one answer on its way to all who asked for the same
once.py       idempotency keys
epochs.py     what has been invalidated

semantic.py   `Questions`: found by their meaning, remembered when they are answered
embedder.py   texts as vectors, by local models
guards.py     what two questions must have in common (pure); lexicon.py has its words
judge.py      whether two answers say the same (pure); bounded.py keeps what it knows within its bytes
verifier.py   whether the answer to a similar question may be served (pure)
learner.py    what a tenant's traffic teaches (pure); learning.py has it in Redis, for all replicas
"""

from app.cache.embedder import Embedders
from app.cache.entry import Entry
from app.cache.epochs import INVALIDATED, Scope
from app.cache.flight import Flight
from app.cache.learning import VERIFIER, Learning
from app.cache.once import Kept, Once, kept, once
from app.cache.partition import SEMANTIC, Ask, Turn
from app.cache.room import Cache, Seen, Semantic
from app.cache.semantic import Questions

__all__ = [
    "INVALIDATED",
    "SEMANTIC",
    "VERIFIER",
    "Ask",
    "Cache",
    "Embedders",
    "Entry",
    "Flight",
    "Kept",
    "Learning",
    "Once",
    "Questions",
    "Scope",
    "Seen",
    "Semantic",
    "Turn",
    "kept",
    "once",
]
