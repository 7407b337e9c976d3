"""What an answer says of itself: who gave it, how it came about, how its caller stands with the limits. Pure."""

from __future__ import annotations

from functools import lru_cache

from app.core import Exchange, written
from app.errors import GatewayError
from app.recall import cache_headers
from app.settlement import fell_back


def head_of(exchange: Exchange, content_type: bytes, now: float) -> bytes:
    """What every answer says of itself, as lines of its head; `now` in unix seconds.

    A request's id and what is kept in lines have no line break; of all others `written` sees to that.
    """
    call, target, version = exchange.call, exchange.target, exchange.call.config.version
    headers: list[tuple[bytes, bytes]] = []
    if target is None:
        lines = written([(b"content-type", content_type), (b"x-gateway-config-version", version.encode())])
    else:
        model, attempts = exchange.model_resolved or target.model, len(exchange.attempts)
        lines = _answered_by(content_type, version, model, target.provider.name, attempts, fell_back(exchange))
    for name in call.dialect.id_headers:
        lines += b"%b: %b\r\n" % (name, call.request_id.encode())
    if target is None and exchange.recalled is not None and exchange.recalled.model is not None:
        headers += [
            (b"x-gateway-model-resolved", exchange.recalled.model.encode("latin-1", "replace")),
            (b"x-gateway-provider", (exchange.recalled.provider or "").encode()),
        ]
    if exchange.memory is not None:
        headers += cache_headers(exchange.memory, exchange.recalled)
    if exchange.escalated is not None:
        headers.append((b"x-gateway-escalation", exchange.escalated.encode()))
    if exchange.shadowed:
        headers.append((b"x-gateway-shadow", b"true"))
    if exchange.hedged:
        headers.append((b"x-gateway-hedge", b"true"))
    if exchange.rule is not None:
        headers.append((b"x-gateway-rule", exchange.rule.encode()))
    if exchange.alias_requested is not None:
        headers.append((b"x-gateway-downgraded-from", exchange.alias_requested.encode()))
    if headers:
        lines += written(headers)
    if exchange.rates is not None:
        lines += call.dialect.rate_headers(exchange.rates, now)
    return lines


@lru_cache(512)
def _answered_by(content_type: bytes, version: str, model: str, provider: str, attempts: int, fallback: bool) -> bytes:
    """Who has answered, and in what form. Kept, since most are said to be by one of a few; a model is a `word`, so it
    is short.
    """
    return written(
        [
            (b"content-type", content_type),
            (b"x-gateway-config-version", version.encode()),
            (b"x-gateway-model-resolved", model.encode("latin-1", "replace")),
            (b"x-gateway-provider", provider.encode()),
            (b"x-gateway-attempts", b"%d" % attempts),
            (b"x-gateway-fallback", b"true" if fallback else b"false"),
        ]
    )


def retry_headers(error: GatewayError, status: int) -> list[tuple[bytes, bytes]]:
    """When to try again, for the client's SDK: every 429 and 503 says so."""
    headers = []
    if status in (429, 503) or (status == 409 and error.retry_after_seconds):
        wait = max(1, -int(-(error.retry_after_seconds or 1.0) // 1))
        headers.append((b"retry-after", b"%d" % wait))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return headers
