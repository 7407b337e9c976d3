"""The limits room: what a call may need is reserved before it and settled after it, one Redis round trip each.

scopes.py    which limits a call takes from, under which keys, with which words for whom they refuse
room.py      `Limits`: reserve, settle, leases
share.py     the limits of one process while Redis is away
*.lua        the arithmetic, on Redis's clock
"""

from app.limits.room import Limits

__all__ = ["Limits"]
