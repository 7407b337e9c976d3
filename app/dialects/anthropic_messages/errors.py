"""What goes wrong, and what is left of the limits, in Anthropic's words.

Source: Anthropic API reference, Errors and Rate limits. Its SDKs raise on `event: error` in mid-stream.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from app.core import Rates
from app.errors import GatewayError, LimitError, VendorRefused
from app.sse import frame

_encode = msgspec.json.encode

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""By status. Others are `invalid_request_error` below 500 and `api_error` from there on."""


def error_body(error: GatewayError, request_id: str | None) -> bytes:
    """The envelope. `code`, and `param` and `limit` where they say something, are ours beside Anthropic's members."""
    status, code, kind = error.status, error.code, None
    if isinstance(error, VendorRefused):
        status = error.vendor_status or 400
        code = error.vendor_code or "invalid_request"
        kind = error.kind if error.kind in TYPES.values() else None
    inside: dict[str, object] = {"type": kind or type_of(status), "message": error.message, "code": code}
    if error.param is not None:
        inside["param"] = error.param
    if isinstance(error, LimitError):
        inside["limit"] = error.limit
    return _encode({"type": "error", "error": inside, "request_id": request_id})


def type_of(status: int) -> str:
    return TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")


def error_frames(error: GatewayError, request_id: str, sent: bytes = b"") -> bytes:
    """The one event that ends a stream."""
    return frame(error_body(error, request_id), "error")


def rate_headers(rates: Rates, now: float) -> bytes:
    """`anthropic-ratelimit-*`, as lines of a head; a limit is whole again at a time, in RFC 3339. `now` is in unix
    seconds.
    """
    lines = b""
    for name, limit, remaining, reset_seconds in (
        (b"requests", rates.limit_requests, rates.remaining_requests, rates.reset_requests_seconds),
        (b"tokens", rates.limit_tokens, rates.remaining_tokens, rates.reset_tokens_seconds),
    ):
        if limit is not None:
            lines += _RATES % (name, limit, name, remaining, name, _time(now + reset_seconds))
    return lines


_RATES = b"""\
anthropic-ratelimit-%b-limit: %d\r
anthropic-ratelimit-%b-remaining: %d\r
anthropic-ratelimit-%b-reset: %b\r
"""


def _time(unix_seconds: float) -> bytes:
    """The second in which it comes true, so that nobody comes too soon."""
    at = datetime.fromtimestamp(int(unix_seconds), UTC) + timedelta(seconds=bool(unix_seconds % 1))
    return f"{at:%Y-%m-%dT%H:%M:%SZ}".encode()
