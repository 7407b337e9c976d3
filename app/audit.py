"""The audit line: who did what to the gateway, and when. One JSON object a line, in the log stream."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


def audit_line(at: str, who: str, action: str, what: Mapping[str, object]) -> bytes:
    """`at` is RFC 3339; `action` is a noun and a verb, `key.revoke`; `what` names its objects, never a secret."""
    return msgspec.json.encode({"time": at, "message": "audit", "who": who, "action": action, **what})
