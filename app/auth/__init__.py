"""Who calls, on whose behalf, and what they may use.

`callers.py` finds out who calls, by key, token (`tokens.py`, `jwks.py`) or certificate; `policy.py` says what they may.
"""

from app.auth.callers import Callers, header_map, scope_headers
from app.auth.jwks import KeySets
from app.auth.policy import allow, allowed, authorize, goes_on, keeper, require, substitute
from app.auth.tokens import Tokens

__all__ = [
    "Callers", "KeySets", "Tokens", "allow", "allowed", "authorize", "goes_on", "header_map", "keeper", "require",
    "scope_headers", "substitute",
]  # fmt: skip
