"""What Google's errors mean: google.rpc's envelope, with its details.

Source: Google Cloud API design guide (errors), Gemini API troubleshooting, recorded errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from app.errors import VendorError, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers.gemini.wire import ErrorBody
from app.providers.openai import retry_after

_envelope = msgspec.json.Decoder(dict[str, Raw])
_envelopes = msgspec.json.Decoder(list[dict[str, Raw]])
_error = msgspec.json.Decoder(ErrorBody)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

BAD_KEYS = frozenset({"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_SERVICE_BLOCKED"})
"""Reasons that come with status 400."""
_DELAY = re.compile(r"(\d{1,6}(?:\.\d{1,9})?)s")
TOO_LONG = re.compile(r"The input token count \(?\d+\)? exceeds the maximum number of tokens allowed \(?\d+\)?\.?")
"""The vendor's whole sentence for a context that is full: it has no code for it, and apps act on OpenAI's."""


def error(status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    """Status first, then the canonical code and the reasons in the details.

    A bad key is a 400, and so is an account that may not use the API where it stands; a 429 tells its wait in the body.
    """
    return _by_status(status, _error_body(body), retry_after(headers))


def _by_status(status: int, written: ErrorBody, wait_seconds: float | None) -> VendorError:
    facts = {"vendor_status": status, "vendor_code": written.status}
    details = written.details or []
    own_fault = any(detail.reason in BAD_KEYS for detail in details) or written.status == "FAILED_PRECONDITION"
    if status in (401, 402, 403, 404) or (status == 400 and own_fault):
        return VendorMisconfigured(f"the vendor answered {status}", **facts)
    delays = [float(match[1]) for detail in details if (match := _DELAY.fullmatch(detail.retry_delay or ""))]
    wait = max([*delays, *([] if wait_seconds is None else [wait_seconds])], default=None)
    if status == 429:
        return VendorThrottled("the vendor throttled", retry_after_seconds=wait, **facts)
    if status in (408, 409, 499) or status >= 500 or status < 400:
        return VendorFailed(f"the vendor answered {status}", retry_after_seconds=wait, **facts)
    if TOO_LONG.fullmatch(written.message or ""):
        facts["vendor_code"] = "context_length_exceeded"
    return VendorRefused(written.message or f"The vendor refused the request with status {status}.", **facts)


def _error_body(body: bytes) -> ErrorBody:
    """The envelope, also inside a list, as some endpoints write it; empty where it is neither."""
    try:
        envelope = _envelopes.decode(body)[0] if body.lstrip()[:1] == b"[" else _envelope.decode(body)
        return _error.decode(envelope["error"])
    except (*_UNREADABLE, LookupError):
        return ErrorBody()


def error_in_answer(written: Raw) -> VendorError:
    """An error in the middle of a stream; its `code` is the status."""
    try:
        inside = _error.decode(written)
    except _UNREADABLE:
        inside = ErrorBody()
    if inside.code is not None and 400 <= inside.code < 600:
        return _by_status(inside.code, inside, None)
    return VendorFailed("the vendor reported an error inside its answer", vendor_code=inside.status)
