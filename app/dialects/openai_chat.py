"""The front door's OpenAI dialect: chat requests in, errors and error events out.

Source: OpenAI API reference. The official SDKs raise on `data: {"error": …}` in mid-stream.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Raw

from app.config import NAME
from app.core import Rates
from app.errors import GatewayError, InvalidRequest, LimitError, VendorRefused
from app.sse import DONE, frame
from app.wire import ChatRequest, StreamOptions

T = TypeVar("T")
_encode = msgspec.json.encode
_members = msgspec.json.Decoder(dict[str, Raw])
MAX_OUTPUT_TOKENS = 100_000_000
MAX_CHOICES = 128
"""OpenAI's bound. What a call asks for is reserved, so figures that no vendor serves are refused before they count."""
_text = msgspec.json.Decoder(str)
_flag = msgspec.json.Decoder(bool | None)
_options = msgspec.json.Decoder(StreamOptions | None)
_tokens = msgspec.json.Decoder(Annotated[int, Meta(ge=0, le=MAX_OUTPUT_TOKENS)] | None)
_choices = msgspec.json.Decoder(Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None)


def read(body: bytes) -> ChatRequest:
    """The request in `body`; the members we do not act on stay as the client wrote them.

    Raises InvalidRequest.
    """
    fields = members(body)
    alias = alias_of(fields)
    if not _is_list(fields.get("messages")):
        raise InvalidRequest("`messages` must be a list.", param="messages")
    stream = ("stream" in fields and member(fields, "stream", _flag)) or False
    options = member(fields, "stream_options", _options) if stream else None
    output = member(fields, "max_completion_tokens", _tokens) if "max_completion_tokens" in fields else None
    if output is None and "max_tokens" in fields:
        output = member(fields, "max_tokens", _tokens)
    choices = member(fields, "n", _choices) if "n" in fields else None
    return ChatRequest(
        body, alias, fields, stream, bool(options and options.include_usage), output, 1 if choices is None else choices
    )


def _is_list(written: Raw | None) -> bool:
    return written is not None and memoryview(written)[0] == 0x5B


def members(body: bytes) -> dict[str, Raw]:
    """The members of a JSON object as the client wrote them. Raises InvalidRequest."""
    try:
        if not body.isascii():
            body.decode()
        return _members.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 at byte {error.start}.") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        if not body:
            raise InvalidRequest("The body is empty: send a JSON object.") from None
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None


def alias_of(fields: dict[str, Raw]) -> str:
    """The alias that `model` names. Raises InvalidRequest."""
    return named_alias(member(fields, "model", _text))


@lru_cache(1024)
def named_alias(alias: str | None) -> str:
    """The same where `model` has been read. Raises InvalidRequest."""
    if alias is None:
        raise InvalidRequest("`model` is required: the name of an alias from GET /v1/models.", param="model")
    if not NAME.fullmatch(alias):
        raise InvalidRequest(f"`model` must name an alias: {NAME.pattern}.", param="model")
    return alias


def member(fields: dict[str, Raw], name: str, shape: msgspec.json.Decoder[T]) -> T | None:
    """One member in its shape, None where it is absent. Raises InvalidRequest that names it."""
    written = fields.get(name)
    if written is None:
        return None
    try:
        return shape.decode(written)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"`{name}`: {error}.", param=name) from None


def rate_headers(rates: Rates, _: float) -> bytes:
    """How the caller stands with its limits, under OpenAI's names, as lines of a head."""
    lines = b""
    if rates.limit_requests is not None:
        reset = duration(rates.reset_requests_seconds)
        lines = _REQUESTS % (rates.limit_requests, rates.remaining_requests, reset)
    if rates.limit_tokens is not None:
        reset = duration(rates.reset_tokens_seconds)
        lines += _TOKENS % (rates.limit_tokens, rates.remaining_tokens, reset)
    return lines


_RATES = b"""\
x-ratelimit-limit-requests: %d\r
x-ratelimit-remaining-requests: %d\r
x-ratelimit-reset-requests: %b\r
"""
_REQUESTS, _TOKENS = _RATES, _RATES.replace(b"requests", b"tokens")


def duration(seconds: float) -> bytes:
    """OpenAI's form: `120ms`, `1s`, `6m0s`, `2h3m4s`."""
    return b"%dms" % round(seconds * 1000) if seconds < 1 else _whole(round(seconds))


@lru_cache(1024)
def _whole(seconds: int) -> bytes:
    """Kept: limits are whole again after the same few times, call after call."""
    if seconds < 60:
        return b"%ds" % seconds
    if seconds < 3600:
        return b"%dm%ds" % (seconds // 60, seconds % 60)
    return b"%dh%dm%ds" % (seconds // 3600, seconds // 60 % 60, seconds % 60)


def error_body(error: GatewayError, _: str | None = None) -> bytes:
    """OpenAI's error envelope; a limit that tripped is named in `limit`. The request's id stands in a header alone."""
    inside: dict[str, object] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, VendorRefused):
        inside["type"] = error.kind or "invalid_request_error"
        inside["code"] = error.vendor_code or "invalid_request"
    if isinstance(error, LimitError):
        inside["limit"] = error.limit
    return _encode({"error": inside})


def error_frames(error: GatewayError, request_id: str | None = None, sent: bytes = b"") -> bytes:
    """The one error event that ends a stream, and the terminator that clients wait for."""
    return frame(error_body(error)) + DONE


def models(names: list[str]) -> bytes:
    """The list of models; an alias was created at no time."""
    return _encode({"object": "list", "data": [_model(name) for name in names]})


def model(name: str) -> bytes:
    return _encode(_model(name))


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gateway"}
