"""Who may ask the simulated Bedrock: requests that are signed right, or carry a Bedrock API key.

The signature is computed again by botocore from what arrived. Every access key id is good but those that begin with
`BAD`; its secret is `SECRET_ACCESS_KEY`, or the key that the simulator was told to insist on.
"""

from __future__ import annotations

import hmac
import re
from datetime import UTC, datetime

from loadtest.simulator.http import Request
from loadtest.simulator.shape import Problem

SECRET_ACCESS_KEY = "simulator"
_MOST_SKEW_SECONDS = 300
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<id>[^/,]+)/(?P<day>\d{8})/(?P<region>[a-z0-9-]+)/(?P<service>[a-z-]+)/"
    r"aws4_request, SignedHeaders=(?P<headers>[a-z0-9;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)
_MUST_BE_SIGNED = {"host", "x-amz-date"}


def authorize(request: Request, key: str | None) -> Problem | None:
    written = request.headers.get("authorization", "")
    if not written:
        return _refused("MissingAuthenticationTokenException", "There is no credential in this request.")
    if written.startswith("Bearer "):
        token = written[7:].strip()
        good = not token.startswith("bad-") and key in (None, token)
        return None if good else _refused("AccessDeniedException", "This API key is not one of ours.")
    parts = _AUTHORIZATION.fullmatch(written)
    if parts is None or parts["service"] != "bedrock":
        return _refused("IncompleteSignatureException", "The authorization header is not a signature for bedrock.")
    if parts["id"].startswith("BAD"):
        return _refused("UnrecognizedClientException", "The security token in this request is not one of ours.")
    names = set(parts["headers"].split(";"))
    if not names >= _MUST_BE_SIGNED or not names <= set(request.headers):
        return _refused("InvalidSignatureException", "Headers that have to be signed are not, or signed ones are gone.")
    signed_at = request.headers["x-amz-date"]
    if not _is_now(signed_at) or signed_at[:8] != parts["day"]:
        return _refused("InvalidSignatureException", f"The signature is of {signed_at}, which is not now.")
    wanted = signature(request, parts["id"], key or SECRET_ACCESS_KEY, parts["region"], names)
    if not hmac.compare_digest(wanted, parts["signature"]):
        return _refused("InvalidSignatureException", "The signature is another one than this request has.")
    return None


def signature(request: Request, access_key_id: str, secret: str, region: str, names: set[str]) -> str:
    """What botocore signs a request with, if it has these headers."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    auth = SigV4Auth(Credentials(access_key_id, secret), "bedrock", region)
    headers = {name: request.headers[name] for name in names}
    url = f"http://{request.headers['host']}{request.target}"
    again = AWSRequest(request.method, url, headers, request.body)
    again.context["timestamp"] = request.headers["x-amz-date"]
    return auth.signature(auth.string_to_sign(again, auth.canonical_request(again)), again)


def _is_now(written: str) -> bool:
    try:
        at = datetime.strptime(written, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return abs((datetime.now(UTC) - at).total_seconds()) <= _MOST_SKEW_SECONDS


def _refused(kind: str, message: str) -> Problem:
    return Problem(403, message, code=kind)
