"""What clients speak at our front doors: the routes that a call can come by, and who answers there in which words.

A dialect that is not the internal form wraps a vendor's translator: its requests become chat completions on the way in,
and what the translator gives back becomes the dialect's on the way out. Where the vendor speaks the dialect itself, the
vendor has a translator of its own for it, which relays. So there is one translation per dialect and one per vendor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from app.core import Dialect, Rates
from app.dialects import anthropic_messages, openai_chat, openai_embeddings, openai_responses, passed
from app.errors import GatewayError
from app.providers import NATIVE, PROVIDERS
from app.providers.translator import Translator

_CHAT = Dialect("chat", openai_chat.read, openai_chat.error_body, openai_chat.error_frames, openai_chat.rate_headers)
_MESSAGES = Dialect(
    "messages",
    anthropic_messages.read,
    anthropic_messages.error_body,
    anthropic_messages.error_frames,
    anthropic_messages.rate_headers,
    id_headers=anthropic_messages.ID_HEADERS,
    relayed=anthropic_messages.RELAYED,
)
ROUTES: dict[str, Dialect] = {
    "/v1/chat/completions": _CHAT,
    "/v1/embeddings": replace(_CHAT, name="embeddings", read=openai_embeddings.read),
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": replace(_MESSAGES, read=anthropic_messages.read_count),
    "/v1/responses": replace(
        _CHAT, name="responses", read=openai_responses.read, error_frames=openai_responses.error_frames
    ),
    **{path: replace(_CHAT, name="passed", read=read) for path, read in passed.READERS.items()},
}
"""By path; each takes POST."""
BELOW: dict[str, Dialect] = {
    "/v1/responses/": replace(_CHAT, name="kept", read=openai_responses.nothing, methods=openai_responses.METHODS),
}
"""By the path that they are below. What they ask for stands in the method and the path: `named` reads it."""


def named(below: Dialect, method: str, path: str, query: str) -> Dialect:
    """The dialect of one request below a route."""
    return replace(below, read=lambda _: openai_responses.read_kept(method, path, query))


WRAPPERS: dict[str, Callable[[Translator], Translator]] = {
    "messages": anthropic_messages.over,
    "responses": openai_responses.over,
}
"""By dialect, for those that are not the internal form: a translator that speaks the dialect over one that does not."""

_SPOKEN: dict[tuple[str, str], Translator] = {
    (dialect.name, kind): NATIVE.get((dialect.name, kind)) or WRAPPERS.get(dialect.name, lambda same: same)(spoken)
    for dialect in (*ROUTES.values(), *BELOW.values())
    for kind, spoken in PROVIDERS.items()
}


def translator(dialect: Dialect, kind: str) -> Translator:
    """Who translates between a dialect's clients and a vendor of that kind."""
    return _SPOKEN[dialect.name, kind]


class Words(Struct, frozen=True):
    """What is said beside calls: the models, one model, how limits stand (lines of a head), and errors with the
    request's id if known.
    """

    models: Callable[[list[str]], bytes]
    model: Callable[[str], bytes]
    error_body: Callable[[GatewayError, str | None], bytes]
    rate_headers: Callable[[Rates, float], bytes]


_OPENAI = Words(openai_chat.models, openai_chat.model, openai_chat.error_body, openai_chat.rate_headers)
_ANTHROPIC = Words(
    anthropic_messages.models,
    anthropic_messages.model,
    anthropic_messages.error_body,
    anthropic_messages.rate_headers,
)


def words_for(headers: Mapping[str, str]) -> Words:
    """The words of a client, told by its headers: every request to Anthropic names a version of the API."""
    return _ANTHROPIC if "anthropic-version" in headers else _OPENAI
