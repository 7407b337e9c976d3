"""Models as Anthropic lists them: aliases, all on one page.

Source: Anthropic API reference, Models; a time of release that is not known is the epoch.
"""

from __future__ import annotations

import msgspec

_encode = msgspec.json.encode


def models(names: list[str]) -> bytes:
    first, last = (names[0], names[-1]) if names else (None, None)
    listed = [_model(name) for name in names]
    return _encode({"data": listed, "has_more": False, "first_id": first, "last_id": last})


def model(name: str) -> bytes:
    return _encode(_model(name))


def _model(name: str) -> dict[str, object]:
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
    }
