"""Signature Version 4 by botocore, or a Bedrock API key as a bearer token.

Source: AWS General Reference, "Signing AWS API requests"; Bedrock user guide, "API keys".
"""

from __future__ import annotations

from datetime import UTC, datetime

from app.config import Credential
from app.errors import VendorMisconfigured
from app.providers.translator import Outgoing

MISSING = "Bedrock needs the package botocore: install llm-gateway[bedrock]."


def sign(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    """Without an access key id the secret is a Bedrock API key.

    Raises VendorMisconfigured without botocore, and without any credential.
    """
    if not credential.secret.reveal():
        raise VendorMisconfigured("There is no AWS credential: set access_key_id and secret_access_key, or api_key.")
    if not credential.access_key_id:
        bearer = ("authorization", "Bearer " + credential.secret.reveal())
        return Outgoing(outgoing.url, (*outgoing.headers, bearer), outgoing.body)
    try:
        from botocore.auth import SIGV4_TIMESTAMP, SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
    except ImportError as error:
        raise VendorMisconfigured(MISSING) from error
    token = credential.session_token.reveal() if credential.session_token else None
    auth = SigV4Auth(
        Credentials(credential.access_key_id, credential.secret.reveal(), token), "bedrock", credential.region
    )
    timestamp = datetime.fromtimestamp(at, UTC).strftime(SIGV4_TIMESTAMP)
    headers = {**dict(outgoing.headers), "x-amz-date": timestamp}
    if token is not None:
        headers["x-amz-security-token"] = token
    request = AWSRequest("POST", outgoing.url, headers, outgoing.body)
    # `add_auth` does the same with the time of the wall clock.
    request.context["timestamp"] = timestamp
    to_sign = auth.string_to_sign(request, auth.canonical_request(request))
    names = auth.signed_headers(auth.headers_to_sign(request))
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={auth.scope(request)}, SignedHeaders={names}, "
        f"Signature={auth.signature(to_sign, request)}"
    )
    return Outgoing(outgoing.url, tuple(headers.items()), outgoing.body)
