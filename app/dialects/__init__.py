"""What clients speak at our front doors: the routes that a call can come by, and who answers there in which words.

A dialect that is not the internal form wraps a vendor's translator: its requests become chat completions on the way in,
and what the translator gives back becomes the dialect's on the way out. Where the vendor speaks the dialect itself, the
vendor has a translator of its own for it, which relays. So there is one translation per dialect and one per vendor.
"""

from __future__ import annotations

from collections.abc import Callable

from app.core import Dialect
from app.dialects import openai_chat, openai_embeddings
from app.providers import NATIVE, PROVIDERS
from app.providers.translator import Translator

ROUTES: dict[str, Dialect] = {
    "/v1/chat/completions": Dialect(
        "chat", openai_chat.read, openai_chat.error_body, openai_chat.error_frames, openai_chat.rate_headers
    ),
    "/v1/embeddings": Dialect(
        "embeddings", openai_embeddings.read, openai_chat.error_body, openai_chat.error_frames, openai_chat.rate_headers
    ),
}
"""By path; each takes POST."""

WRAPPERS: dict[str, Callable[[Translator], Translator]] = {}
"""By dialect, for those that are not the internal form: a translator that speaks the dialect over one that does not."""

_SPOKEN: dict[tuple[str, str], Translator] = {
    (dialect.name, kind): NATIVE.get((dialect.name, kind)) or WRAPPERS.get(dialect.name, lambda same: same)(spoken)
    for dialect in ROUTES.values()
    for kind, spoken in PROVIDERS.items()
}


def translator(dialect: Dialect, kind: str) -> Translator:
    """Who translates between a dialect's clients and a vendor of that kind."""
    return _SPOKEN[dialect.name, kind]
