"""What Bedrock's errors mean: the status first, then the exception's exact type."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from app.errors import VendorError, VendorFailed, VendorMisconfigured, VendorRefused, VendorThrottled
from app.providers.bedrock.wire import UNREADABLE, ErrorBody
from app.providers.openai import retry_after

_error = msgspec.json.Decoder(ErrorBody)

STATUS_OF = {
    "throttlingException": 429,
    "validationException": 400,
    "modelStreamErrorException": 424,
    "modelTimeoutException": 408,
    "serviceUnavailableException": 503,
    "internalServerException": 500,
}
"""The status of an exception that arrives inside a stream. A type that is not here counts as 500."""

FAILED = frozenset({"ModelErrorException", "ModelStreamErrorException", "ModelTimeoutException"})
"""The model failed; some of these come with 424, which is no fault of the request."""
THROTTLED = frozenset({"ThrottlingException", "ServiceQuotaExceededException"})
CREDENTIAL = frozenset(
    {
        "AccessDeniedException",
        "ExpiredTokenException",
        "IncompleteSignatureException",
        "InvalidSignatureException",
        "MissingAuthenticationTokenException",
        "UnrecognizedClientException",
    }
)
"""Our credential is at fault, whatever the status."""
TOO_LONG = re.compile(r"Input is too long for requested model\.?")
"""The vendor's whole sentence for a context that is full: it has no code for it, and apps act on OpenAI's."""


def error(status: int, headers: Mapping[str, str], body: bytes) -> VendorError:
    """`x-amzn-errortype` names the exception, with a URL behind a colon."""
    kind = headers.get("x-amzn-errortype", "").partition(":")[0] or None
    return classed(status, kind, message_of(body), retry_after(headers))


def event_error(kind: str, body: bytes) -> VendorError:
    """An exception inside a stream, whose type begins with a small letter there."""
    return classed(STATUS_OF.get(kind, 500), kind[:1].upper() + kind[1:] or None, message_of(body), None)


def classed(status: int, kind: str | None, message: str | None, wait_seconds: float | None) -> VendorError:
    facts = {"vendor_status": status, "vendor_code": kind}
    if kind in CREDENTIAL or status in (401, 402, 403, 404):
        return VendorMisconfigured(f"the vendor answered {status}", **facts)
    if kind in THROTTLED or status == 429:
        return VendorThrottled("the vendor throttled", retry_after_seconds=wait_seconds, **facts)
    if kind in FAILED or status in (408, 409, 424) or status >= 500 or status < 400:
        return VendorFailed(f"the vendor answered {status}", retry_after_seconds=wait_seconds, **facts)
    if TOO_LONG.fullmatch(message or ""):
        facts["vendor_code"] = "context_length_exceeded"
    return VendorRefused(message or f"The vendor refused the request with status {status}.", kind=kind, **facts)


def message_of(body: bytes) -> str | None:
    try:
        return _error.decode(body).message
    except UNREADABLE:
        return None
