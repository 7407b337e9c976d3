"""Credentials that are fetched, a token or AWS's chain: asked for once, renewed ahead, refused clearly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from app.ambient import Ambient
from app.config import AwsChain, Credential, Secret, ServiceAccount
from app.config.accounts import account as read_account
from app.config.reading import Faults, Secrets
from app.config.written import WrittenProvider
from app.core import Reply
from app.credentials import GRANT, MARGIN_SECONDS, Credentials
from app.errors import VendorMisconfigured, VendorUnreachable
from app.providers.translator import Outgoing
from app.vendors import KINDS, Vendor
from tests.gateway_parts import ALIAS, Rooms, ScriptedAnswer, ScriptedUpstream, completion, config, request
from tests.test_gateway import serve

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PEM = KEY.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
EMAIL = "gateway@project.iam.gserviceaccount.com"
TOKEN_URL = "https://oauth2.googleapis.com/token"
ACCOUNT = ServiceAccount(EMAIL, Secret(PEM), "key-1", TOKEN_URL)
LIFE = 3600


class Standing(Ambient):
    """Stands still unless it is told the time."""

    at = 1_800_000_000.0

    def now(self) -> float:
        return self.at


class TokenServer:
    """Answers as Google's token endpoint. `asked` has the forms; `answer` may be replaced, `gate` holds it back."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.answer: Callable[[], httpx.Response] = self.token

    def token(self) -> httpx.Response:
        body = {"access_token": f"token-{len(self.asked)}", "expires_in": LIFE, "token_type": "Bearer"}
        return httpx.Response(200, json=body)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        assert str(request.url) == TOKEN_URL
        self.asked.append({name: values[0] for name, values in parse_qs(request.content.decode()).items()})
        self.reached.set()
        await self.gate.wait()
        return self.answer()


Test = Callable[[Credentials, TokenServer, Standing], Awaitable[None]]


def run(test: Test, fetch_seconds: float = 10.0) -> None:
    async def rooms() -> None:
        server, clock = TokenServer(), Standing()
        room = Credentials(lambda: httpx.AsyncClient(transport=httpx.MockTransport(server)), clock, fetch_seconds)
        try:
            await test(room, server, clock)
        finally:
            await room.close()

    asyncio.run(rooms())


async def settled(room: Credentials) -> None:
    """Until no fetch is under way."""
    await asyncio.gather(*room.fetches.values(), return_exceptions=True)


def told(credential: Credential) -> str:
    return credential.secret.reveal()


# --- a service account ------------------------------------------------------------------------------------------------


def test_the_assertion_says_who_asks_for_what_and_is_signed() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        (form,) = server.asked
        assert form["grant_type"] == GRANT
        assert jwt.get_unverified_header(form["assertion"]) == {"alg": "RS256", "kid": "key-1", "typ": "JWT"}
        options = {"verify_exp": False, "verify_iat": False}
        claims = jwt.decode(form["assertion"], KEY.public_key(), ["RS256"], audience=TOKEN_URL, options=options)
        assert (claims["iss"], claims["iat"], claims["exp"] - claims["iat"]) == (EMAIL, int(clock.at), 600)
        assert claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"

    run(test)


def test_calls_that_come_together_share_one_fetch() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        found = await asyncio.gather(*(room.of(ACCOUNT) for _ in range(50)))
        assert {told(one) for one in found} == {"token-1"}
        assert len(server.asked) == 1

    run(test)


def test_a_token_is_kept() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        clock.at += LIFE / 2
        assert told(await room.of(ACCOUNT)) == "token-1"
        assert len(server.asked) == 1

    run(test)


def test_a_token_is_renewed_ahead_without_a_call_that_waits() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        clock.at += LIFE * 0.9
        server.gate.clear()
        assert told(await room.of(ACCOUNT)) == "token-1"
        server.gate.set()
        await settled(room)
        assert told(await room.of(ACCOUNT)) == "token-2"

    run(test)


def test_a_token_that_is_about_to_expire_is_not_given_out() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        clock.at += LIFE - MARGIN_SECONDS
        assert told(await room.of(ACCOUNT)) == "token-2"

    run(test)


def test_a_renewal_that_fails_leaves_the_old_token_and_is_not_repeated_at_once() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        clock.at += LIFE * 0.9
        server.answer = lambda: httpx.Response(503)
        for _ in range(3):
            assert told(await room.of(ACCOUNT)) == "token-1"
            await settled(room)
        assert len(server.asked) == 2

    run(test)


def test_a_call_that_gives_up_does_not_end_the_fetch_for_others() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        server.gate.clear()
        impatient = asyncio.ensure_future(room.of(ACCOUNT))
        patient = asyncio.ensure_future(room.of(ACCOUNT))
        await server.reached.wait()
        impatient.cancel()
        server.gate.set()
        assert told(await patient) == "token-1"

    run(test)


def test_a_rotated_key_is_asked_for_anew() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        await room.of(ServiceAccount(EMAIL, Secret(PEM), "key-2", TOKEN_URL))
        kids = [jwt.get_unverified_header(form["assertion"])["kid"] for form in server.asked]
        assert kids == ["key-1", "key-2"]

    run(test)


def test_an_account_that_is_gone_is_forgotten_once_its_token_has_expired() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(ACCOUNT)
        clock.at += LIFE + 1
        await room.of(ServiceAccount(EMAIL, Secret(PEM), "key-2", TOKEN_URL))
        assert [account.key_id for account in room.held] == ["key-2"]

    run(test)


def refused(answer: Callable[[], httpx.Response], kind: type[Exception], account: ServiceAccount = ACCOUNT) -> str:
    said = ""

    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        nonlocal said
        server.answer = answer
        with pytest.raises(kind) as raised:
            await room.of(account)
        said = str(raised.value)

    run(test)
    return said


def test_a_refused_key_is_misconfigured_and_says_why() -> None:
    body = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
    said = refused(lambda: httpx.Response(400, json=body), VendorMisconfigured)
    assert said == f"{TOKEN_URL} refused the key of the service account {EMAIL}: invalid_grant"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"error":7}', b'{"error":"<script>"}', b"\xff"])
def test_a_refusal_without_a_reason_repeats_nothing(body: bytes) -> None:
    assert refused(lambda: httpx.Response(401, content=body), VendorMisconfigured).endswith(": no reason given")


@pytest.mark.parametrize(
    "answer",
    [
        lambda: httpx.Response(500),
        lambda: httpx.Response(429),
        lambda: httpx.Response(200, content=b"<html>"),
        lambda: httpx.Response(200, content=b"{}"),
    ],
)
def test_an_endpoint_that_fails_is_unreachable(answer: Callable[[], httpx.Response]) -> None:
    refused(answer, VendorUnreachable)


def test_an_endpoint_that_cannot_be_reached_is_unreachable() -> None:
    def broken() -> httpx.Response:
        raise httpx.ConnectError("no route")

    refused(broken, VendorUnreachable)


def test_a_redirect_is_not_followed() -> None:
    refused(lambda: httpx.Response(302, headers={"location": "https://elsewhere.example"}), VendorMisconfigured)


def test_a_key_that_is_no_key_is_misconfigured_and_not_repeated() -> None:
    account = ServiceAccount(EMAIL, Secret("not-a-pem"), "key-1", TOKEN_URL)
    said = refused(lambda: httpx.Response(200), VendorMisconfigured, account)
    assert "not-a-pem" not in said
    assert EMAIL in said


def test_a_fetch_has_a_deadline() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        server.gate.clear()
        with pytest.raises(VendorUnreachable):
            await room.of(ACCOUNT)

    run(test, fetch_seconds=0.01)


def test_a_failure_is_not_kept() -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        server.answer = lambda: httpx.Response(503)
        with pytest.raises(VendorUnreachable):
            await room.of(ACCOUNT)
        server.answer = server.token
        assert told(await room.of(ACCOUNT)) == "token-2"

    run(test)


# --- a call -----------------------------------------------------------------------------------------------------------


class HeardUpstream(ScriptedUpstream):
    """Keeps what a vendor is sent."""

    heard: Outgoing | None = None

    async def open(self, outgoing: Outgoing, connect_seconds: float) -> ScriptedAnswer:
        self.heard = outgoing
        return await super().open(outgoing, connect_seconds)


def called(tmp_path: Path, answer: Callable[[], httpx.Response]) -> tuple[Reply, Rooms, HeardUpstream]:
    """A call to an alias whose one provider signs in with the account."""
    rooms = Rooms(tmp_path, ambient=Standing())

    async def answered(request: httpx.Request) -> httpx.Response:
        return answer()

    open_client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(answered))  # noqa: E731
    rooms.dialogue.credentials = Credentials(open_client, rooms.ambient)
    rooms.dialogue.upstream = heard = HeardUpstream(ScriptedAnswer(completion()))
    tables = config()
    (only,) = tables.aliases[ALIAS].targets
    provider = msgspec.structs.replace(only.provider, account=ACCOUNT, credential=Credential(Secret("")))
    alias = msgspec.structs.replace(tables.aliases[ALIAS], targets=(msgspec.structs.replace(only, provider=provider),))
    tables = msgspec.structs.replace(tables, aliases={ALIAS: alias})
    return serve(rooms, request(), config=tables)[0], rooms, heard


def test_a_call_carries_the_account_s_token(tmp_path: Path) -> None:
    reply, _, upstream = called(tmp_path, lambda: httpx.Response(200, json={"access_token": "token-1"}))
    assert reply.status == 200
    assert upstream.heard is not None
    assert ("authorization", "Bearer token-1") in upstream.heard.headers


def test_a_call_whose_account_is_refused_asks_no_vendor_and_says_so_in_its_row(tmp_path: Path) -> None:
    reply, rooms, upstream = called(tmp_path, lambda: httpx.Response(400, json={"error": "invalid_grant"}))
    assert (reply.status, upstream.heard) == (502, None)
    (attempt,) = rooms.row()["attempts"]
    assert (attempt["outcome"], attempt["status"]) == ("misconfigured", None)
    assert (rooms.row()["usage_source"], rooms.row()["error_code"]) == ("none", "upstream_misconfigured")


# --- AWS's chain ------------------------------------------------------------------------------------------------------

needs_botocore = pytest.mark.skipif(find_spec("botocore") is None, reason="botocore is not installed (extra bedrock)")


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An AWS configuration of this test's own, with a profile; no instance to ask."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    file.write_text("[team]\naws_access_key_id = AKIATEAM\naws_secret_access_key = team-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return file


@needs_botocore
def test_the_chain_finds_the_environment(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "env-token")

    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        found = await room.of(AwsChain())
        assert found == Credential(Secret("env-secret"), "AKIAENV", Secret("env-token"))

    run(test)


@needs_botocore
def test_the_chain_finds_a_profile(aws: Path) -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        assert await room.of(AwsChain("team")) == Credential(Secret("team-secret"), "AKIATEAM")

    run(test)


@needs_botocore
def test_a_changed_profile_is_found(aws: Path) -> None:
    changed = aws.read_text().replace("team-secret", "new-secret")

    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        await room.of(AwsChain("team"))
        await asyncio.to_thread(aws.write_text, changed)
        clock.at += 3600
        assert told(await room.of(AwsChain("team"))) == "new-secret"

    run(test)


@needs_botocore
@pytest.mark.parametrize("chain", [AwsChain(), AwsChain("absent")], ids=["nothing", "no such profile"])
def test_a_chain_that_finds_nothing_is_misconfigured(aws: Path, chain: AwsChain) -> None:
    async def test(room: Credentials, server: TokenServer, clock: Standing) -> None:
        with pytest.raises(VendorMisconfigured, match="AWS's default chain"):
            await room.of(chain)

    run(test)


# --- what the configuration says --------------------------------------------------------------------------------------

FILE = {"type": "service_account", "client_email": EMAIL, "private_key": PEM, "private_key_id": "key-1"}


def configured(
    file: dict[str, Any] | str, tmp_path: Path, kind: Vendor = KINDS["vertex"], **members: Any
) -> tuple[object, list[str]]:
    path = tmp_path / "account.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    provider = WrittenProvider(kind="vertex", **({"credentials": f"file:{path}"} | members))
    faults, secrets = Faults(), Secrets({}, True)
    found = read_account(provider, kind, "providers.v", secrets, faults, needed=True)
    return found, faults.sentences


def test_a_key_file_is_read(tmp_path: Path) -> None:
    assert configured(FILE | {"token_uri": TOKEN_URL}, tmp_path) == (ACCOUNT, [])


def test_a_token_url_goes_before_the_file_s(tmp_path: Path) -> None:
    found, faults = configured(FILE | {"token_uri": TOKEN_URL}, tmp_path, token_url="http://127.0.0.1:4010/token")
    assert isinstance(found, ServiceAccount)
    assert (found.token_url, faults) == ("http://127.0.0.1:4010/token", [])


@pytest.mark.parametrize(
    "uri",
    [
        "https://evil.example/token",
        "http://oauth2.googleapis.com/token",
        "https://oauth2.googleapis.com.evil.example/token",
        "https://oauth2.googleapis.com@evil.example/token",
        "https://evil.example/.googleapis.com/token",
    ],
)
def test_a_key_file_cannot_send_the_assertion_elsewhere(tmp_path: Path, uri: str) -> None:
    faults = configured(FILE | {"token_uri": uri}, tmp_path)[1]
    assert len(faults) == 1
    assert "token_uri is not Google's" in faults[0]


@pytest.mark.parametrize("file", ["{}", "no json", "[]", json.dumps(FILE)])
def test_another_file_is_a_fault_that_repeats_nothing(tmp_path: Path, file: str) -> None:
    (fault,) = configured(file, tmp_path)[1]
    assert "is not the JSON key of a Google service account" in fault


def test_an_empty_file_is_a_fault(tmp_path: Path) -> None:
    assert len(configured("", tmp_path)[1]) == 1


AWS = Vendor(account="aws")


@pytest.mark.parametrize(
    ("credentials", "found"),
    [("chain", AwsChain()), ("profile:team", AwsChain("team"))],
)
def test_the_chain_is_named(tmp_path: Path, credentials: str, found: AwsChain) -> None:
    assert configured("", tmp_path, AWS, credentials=credentials) == (found, [])


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (AWS, {"credentials": "default"}),
        (AWS, {"credentials": "profile:../x"}),
        (AWS, {"credentials": "chain", "token_url": "https://x.example"}),
        (Vendor(), {"credentials": "chain"}),
        (KINDS["vertex"], {"credentials": None, "token_url": "https://x.example"}),
        (AWS, {"credentials": "chain", "api_key": "env:KEY"}),
    ],
)
def test_what_does_not_fit_is_a_fault(tmp_path: Path, kind: Vendor, members: dict[str, Any]) -> None:
    assert len(configured("", tmp_path, kind, **members)[1]) == 1


def test_an_account_is_shown_without_its_key() -> None:
    assert PEM[40:80] not in repr(ACCOUNT)
