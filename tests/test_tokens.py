"""Tokens (JWT): whose are believed, about whom, and for how long; and the issuers' keys, from a file or over HTTPS."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from app.auth import Callers, KeySets, Tokens
from app.auth.jwks import public_keys
from app.config import Issuer, ServiceKey
from app.errors import InvalidApiKey, IssuerUnavailable
from tests.gateway_parts import Clock
from tests.test_auth import CONFIG

ISS = "https://login.example.com/"
NOW = 1_800_000_000.0
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
CLAIMS = {"iss": ISS, "aud": "llm-gateway", "exp": NOW + 60, "tenant": "acme-corp", "plan": "free"}


def jwk(private: Any, kid: str, **members: str) -> dict[str, Any]:
    algorithm = {rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm, ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm}
    made = next((a for kind, a in algorithm.items() if isinstance(private, kind)), jwt.algorithms.OKPAlgorithm)
    return made.to_jwk(private.public_key(), as_dict=True) | {"kid": kid} | members


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


SET = key_set(jwk(RSA_KEY, "rsa"), jwk(EC_KEY, "ec"), jwk(ED_KEY, "ed"))


def sign(private: Any = RSA_KEY, kid: str | None = "rsa", algorithm: str = "RS256", **claims: Any) -> str:
    kept = {name: value for name, value in (CLAIMS | claims).items() if value is not None}
    return jwt.encode(kept, private, algorithm, headers={} if kid is None else {"kid": kid})


def issuer(jwks: str, **fields: Any) -> Issuer:
    written: dict[str, Any] = {
        "name": "sso",
        "issuer": ISS,
        "audiences": ("llm-gateway",),
        "jwks": jwks,
        "algorithms": frozenset({"RS256", "ES256", "EdDSA"}),
        "tenants": frozenset(),
        "tenant_prefixes": ("",),
        "tenant_claim": "tenant",
        "plan_claim": "plan",
        "service_claim": "client_id",
        "default_plan": None,
        "plans": None,
        "leeway_seconds": 30.0,
    }
    return Issuer(**(written | fields))


class Door:
    """Callers as a front door asks them, with the keys of one issuer."""

    def __init__(self, jwks: str, client: httpx.AsyncClient | None = None, **fields: Any) -> None:
        self.config = msgspec.structs.replace(CONFIG, issuers={ISS: issuer(jwks, **fields)})
        self.clock = Clock()
        self.key_sets = KeySets(lambda: self.config, lambda: client or httpx.AsyncClient(), self.clock)
        self.callers = Callers(Tokens(self.key_sets))

    async def ask(self, token: str, now: float = NOW) -> ServiceKey:
        headers = {b"authorization": f"Bearer {token}"}
        return self.callers.known(self.config, headers, now) or await self.callers.verified(self.config, headers, now)

    def known(self, token: str, now: float = NOW) -> ServiceKey | None:
        return self.callers.known(self.config, {b"authorization": f"Bearer {token}"}, now)

    def caller(self, token: str, now: float = NOW) -> ServiceKey:
        async def main() -> ServiceKey:
            try:
                return await self.ask(token, now)
            finally:
                await self.key_sets.close()

        return asyncio.run(main())

    def refusal(self, token: str, now: float = NOW) -> str:
        with pytest.raises(InvalidApiKey) as raised:
            self.caller(token, now)
        assert token not in raised.value.message
        return raised.value.message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_bytes(SET)
    return path


@pytest.fixture
def door(file: Path) -> Door:
    return Door(f"file:{file}")


# --- what is believed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "kid", "algorithm"), [(RSA_KEY, "rsa", "RS256"), (EC_KEY, "ec", "ES256"), (ED_KEY, "ed", "EdDSA")]
)
def test_a_token_of_the_issuer_is_believed(door: Door, private: Any, kid: str, algorithm: str) -> None:
    assert door.caller(sign(private, kid, algorithm)) == ServiceKey(
        "jwt.sso", "sso", frozenset({"acme-corp"}), NOW + 90, plan="free", default_tenant="acme-corp"
    )


def test_a_token_says_which_service_calls(door: Door) -> None:
    caller = door.caller(sign(client_id="support-bot"))
    assert (caller.id, caller.service) == ("jwt.sso.support-bot", "support-bot")


@pytest.mark.parametrize("client", ["ann@example.com", "a:b", "", 5, "x" * 65, None])
def test_a_service_that_is_no_name_is_the_issuer(door: Door, client: object) -> None:
    assert door.caller(sign(client_id=client)).id == "jwt.sso"


def test_a_token_for_several_tenants_needs_the_header(door: Door) -> None:
    caller = door.caller(sign(tenant=["acme-corp", "other"]))
    assert (caller.tenants, caller.default_tenant) == (frozenset({"acme-corp", "other"}), None)


def test_an_issuer_speaks_for_its_own_tenants_only(file: Path) -> None:
    door = Door(f"file:{file}", tenant_prefixes=("acme-",))
    assert door.caller(sign(tenant=["acme-corp", "other"])).tenants == frozenset({"acme-corp"})


@pytest.mark.parametrize(
    ("plan", "default", "plans", "counts"),
    [
        ("free", None, None, "free"),
        (None, None, None, None),
        (None, "standard", None, "standard"),
        ("free", "standard", None, "free"),
        ("enterprise", "free", frozenset({"free"}), None),
    ],
)
def test_the_plan_is_the_token_s_or_the_default(
    file: Path, plan: str | None, default: str | None, plans: frozenset[str] | None, counts: str | None
) -> None:
    door = Door(f"file:{file}", default_plan=default, plans=plans)
    assert door.caller(sign(plan=plan)).plan == counts


def test_claims_have_the_names_that_the_issuer_gives_them(file: Path) -> None:
    door = Door(f"file:{file}", tenant_claim="https://x/org", plan_claim="https://x/tier", service_claim="azp")
    caller = door.caller(sign(**{"tenant": None, "https://x/org": "org-1", "https://x/tier": "free", "azp": "bot"}))
    assert (caller.tenants, caller.plan, caller.service) == (frozenset({"org-1"}), "free", "bot")


# --- what is not ------------------------------------------------------------------------------------------------------


def hmac_with_the_public_key() -> str:
    """The oldest trick: the public key as if it were a shared secret."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head, body = (
        jwt.utils.base64url_encode(json.dumps(part).encode()).decode()
        for part in ({"alg": "HS256", "typ": "JWT", "kid": "rsa"}, CLAIMS)
    )
    signature = hmac.new(pem, f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{jwt.utils.base64url_encode(signature).decode()}"


def unsigned() -> str:
    return jwt.encode(CLAIMS, None, "none", headers={"kid": "rsa"})


def tampered() -> str:
    head, body, signature = sign().split(".")
    claims = json.loads(jwt.utils.base64url_decode(body)) | {"tenant": "tools"}
    return f"{head}.{jwt.utils.base64url_encode(json.dumps(claims).encode()).decode()}.{signature}"


def with_its_own_key() -> str:
    """A key inside the token is the sender's."""
    headers = {"kid": "mine", "jwk": jwk(OTHER_RSA_KEY, "mine"), "jku": "https://evil.example/keys"}
    return jwt.encode(CLAIMS, OTHER_RSA_KEY, "RS256", headers=headers)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (hmac_with_the_public_key(), "is not signed by ES256 or EdDSA or RS256"),
        (unsigned(), "is not signed by"),
        (tampered(), "signature or claims"),
        (with_its_own_key(), "does not publish"),
        (sign(OTHER_RSA_KEY), "signature or claims"),
        (sign(kid="ec"), "signature or claims"),
        (sign(kid="unknown"), "does not publish"),
        (sign(kid=None), "does not publish"),
        (sign(algorithm="PS256"), "is not signed by"),
        (sign(algorithm="RS512"), "is not signed by"),
        (sign(iss="https://evil.example/"), "issuer (iss) is not one"),
        (sign(iss=None), "issuer (iss) is not one"),
        (sign(aud="another"), "another audience"),
        (sign(aud=None), "signature or claims"),
        (sign(aud=["another"]), "another audience"),
        (sign(exp=None), "signature or claims"),
        (sign(exp=NOW - 31), "has expired (exp)"),
        (sign(exp="tomorrow"), "exp is not a number"),
        (sign(exp=True), "exp is not a number"),
        (sign(exp=float("inf")), "exp is not a number"),
        (sign(exp=float("nan")), "exp is not a number"),
        (sign(nbf=NOW + 31), "not valid yet"),
        (sign(nbf="x"), "nbf is not a number"),
        (sign(tenant=None), "'tenant' must name a tenant"),
        (sign(tenant="a:b"), "'tenant' must name a tenant"),
        (sign(tenant="_gateway"), "'tenant' must name a tenant"),
        (sign(tenant=[]), "'tenant' must name a tenant"),
        (sign(tenant=["ok", 5]), "'tenant' must name a tenant"),
        (sign(tenant={"a": 1}), "'tenant' must name a tenant"),
        (sign(plan="a b"), "'plan' must name a plan"),
        (sign(plan=5), "'plan' must name a plan"),
        ("a.b.c", "neither a gateway key nor a token"),
        ("..", "neither a gateway key nor a token"),
        ("e30.e30.", "neither a gateway key nor a token|issuer"),
        ("W10.W10.x", "neither a gateway key nor a token"),
        ("a." + "b" * 20_000 + ".c", "longer than"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_a_reason(door: Door, token: str, says: str) -> None:
    message = door.refusal(token)
    assert any(part in message for part in says.split("|")), message


def test_a_token_counts_within_the_leeway_of_clocks(door: Door) -> None:
    assert door.caller(sign(exp=NOW - 29, nbf=NOW - 100))


def test_no_token_is_believed_where_no_issuer_is_configured(door: Door) -> None:
    door.config = CONFIG
    assert "gateway key is unknown" in door.refusal(sign())


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60).map(lambda part: f"{part}.{part}.{part}"))
def test_no_text_breaks_the_reading_of_a_token(text: str) -> None:
    with pytest.raises(InvalidApiKey):
        Door("file:/nowhere").caller(text)


@settings(deadline=None)
@given(st.data())
def test_no_change_of_a_token_s_bytes_is_believed(data: st.DataObject) -> None:
    token = sign()
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda c: c != token[at]))
    changed = token[:at] + other + token[at + 1 :]
    door = Door("file:/nowhere")
    held = door.key_sets._set(door.config.issuers[ISS])
    held.keys, held.content = public_keys(SET), SET
    try:
        caller = door.caller(changed)
    except InvalidApiKey:
        return
    # The last character of a signature has bits that mean nothing.
    assert at == len(token) - 1
    assert caller == door.caller(token)


# --- remembered for a while -------------------------------------------------------------------------------------------


def test_a_verified_token_is_known_without_asking_again(door: Door) -> None:
    token = sign()
    made = door.caller(token)
    assert door.known(token) is made


def test_a_known_token_is_verified_again_after_a_minute(door: Door) -> None:
    token = sign(exp=NOW + 600)
    door.caller(token)
    assert (door.known(token, NOW + 59) is None, door.known(token, NOW + 60)) == (False, None)


def test_a_known_token_expires_at_its_time(door: Door) -> None:
    token = sign(exp=NOW + 1)
    door.caller(token)
    with pytest.raises(InvalidApiKey, match="has expired"):
        door.known(token, NOW + 31)


def test_a_new_configuration_forgets_every_token(door: Door) -> None:
    token = sign()
    door.caller(token)
    door.config = msgspec.structs.replace(door.config, version="another")
    assert door.known(token) is None


def test_a_key_that_its_issuer_withdraws_takes_its_tokens_along(door: Door, file: Path) -> None:
    def withdraw() -> None:
        file.write_bytes(key_set(jwk(EC_KEY, "ec")))

    async def scenario() -> None:
        token = sign()
        await door.ask(token)
        withdraw()
        door.clock.ahead += 11
        await door.key_sets.run_once()
        assert door.known(token) is None
        with pytest.raises(InvalidApiKey, match="does not publish"):
            await door.ask(token)

    asyncio.run(scenario())


def test_tokens_are_remembered_up_to_a_bound(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.auth.tokens.KEPT_TOKENS", 3)

    async def scenario() -> list[bool]:
        tokens = [sign(sub=str(number)) for number in range(5)]
        for token in tokens:
            await door.ask(token)
        return [door.known(token) is not None for token in tokens]

    assert asyncio.run(scenario()) == [False, False, True, True, True]


# --- the issuer's keys ------------------------------------------------------------------------------------------------


class JwksServer(http.server.ThreadingHTTPServer):
    """An issuer over TLS: answers with `status`, `content` and `headers`, and counts."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Keys)
        self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.status, self.content, self.headers = 200, SET, {}
        self.asked = 0
        self.url = f"https://127.0.0.1:{self.server_address[1]}/keys?x=1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Keys(http.server.BaseHTTPRequestHandler):
    server: JwksServer

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[tuple[JwksServer, Callable[..., Door]]]:
    ca = trustme.CA()
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server_tls)
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    server = JwksServer(server_tls)
    yield server, lambda **fields: Door(server.url, httpx.AsyncClient(verify=trusting, timeout=60), **fields)
    server.shutdown()
    server.server_close()


Served = tuple[JwksServer, Callable[..., Door]]


def test_keys_are_asked_for_over_https(served: Served) -> None:
    _, door = served
    assert door().caller(sign()).id == "jwt.sso"


def test_a_hundred_tokens_at_once_ask_the_issuer_once(served: Served) -> None:
    server, door = served

    async def scenario() -> None:
        at = door()
        await asyncio.gather(*(at.ask(sign(sub=str(number))) for number in range(100)))

    asyncio.run(scenario())
    assert server.asked == 1


def test_made_up_kids_do_not_make_us_ask_again_and_again(served: Served) -> None:
    server, door = served

    async def scenario() -> None:
        at = door()
        for number in range(20):
            with pytest.raises(InvalidApiKey, match="does not publish"):
                await at.ask(sign(kid=f"made-up-{number}"))
        assert server.asked == 1
        at.clock.ahead += 11
        with pytest.raises(InvalidApiKey):
            await at.ask(sign(kid="made-up"))

    asyncio.run(scenario())
    assert server.asked == 2


def test_a_new_key_of_the_issuer_is_found_by_the_first_token_that_names_it(served: Served) -> None:
    server, door = served

    async def scenario() -> None:
        at = door()
        await at.ask(sign())
        server.content = key_set(jwk(RSA_KEY, "rsa"), jwk(OTHER_RSA_KEY, "next"))
        at.clock.ahead += 11
        assert await at.ask(sign(OTHER_RSA_KEY, "next"))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "content", "headers"),
    [
        (500, SET, {}),
        (302, SET, {"Location": "https://127.0.0.1:1/"}),
        (200, b"<html>", {}),
        (200, b'{"keys": []}', {}),
        (200, b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}]}', {}),
        (200, b" " * 2_000_000, {}),
    ],
)
def test_an_issuer_that_answers_with_something_else_leaves_its_keys_in_force(
    served: Served, status: int, content: bytes, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    server, door = served

    async def scenario() -> None:
        at = door()
        await at.ask(sign())
        server.status, server.content, server.headers = status, content, headers
        for _ in range(3):
            at.clock.ahead += 400
            await at.key_sets.run_once()
        assert await at.ask(sign(sub="another"))

    asyncio.run(scenario())
    assert caplog.text.count("the keys of issuer sso cannot be read") == 1


def test_a_token_whose_issuer_was_never_reached_is_our_fault_and_not_the_client_s(served: Served) -> None:
    server, door = served
    server.status = 503
    with pytest.raises(IssuerUnavailable):
        door().caller(sign())


def test_keys_are_read_ahead_of_the_first_token(served: Served) -> None:
    server, door = served

    async def scenario() -> None:
        at = door()
        assert await at.key_sets.run_once() == 1
        assert await at.key_sets.run_once() == 0
        await at.ask(sign())

    asyncio.run(scenario())
    assert server.asked == 1


def test_who_is_cancelled_while_waiting_does_not_end_it_for_the_others(served: Served) -> None:
    _, door = served

    async def scenario() -> None:
        at = door()
        first, second = (asyncio.ensure_future(at.ask(sign(sub=str(number)))) for number in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).id == "jwt.sso"
        assert first.cancelled() or (await asyncio.gather(first, return_exceptions=True))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("members", "finds"),
    [
        ({}, True),
        ({"alg": "RS256"}, True),
        ({"use": "sig"}, True),
        ({"alg": "RS512"}, False),
        ({"use": "enc"}, False),
    ],
)
def test_a_key_is_used_only_for_what_its_issuer_says(tmp_path: Path, members: dict[str, str], finds: bool) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "rsa", **members), jwk(EC_KEY, "ec")))
    door = Door(f"file:{file}")
    if finds:
        assert door.caller(sign())
    else:
        assert "does not publish" in door.refusal(sign())


def test_a_token_without_a_kid_is_checked_by_the_only_key(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "rsa")))
    assert Door(f"file:{file}").caller(sign(kid=None))


def test_two_keys_of_one_kid_are_no_key(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set(jwk(RSA_KEY, "rsa"), jwk(OTHER_RSA_KEY, "rsa")))
    assert "does not publish" in Door(f"file:{file}").refusal(sign())


@settings(deadline=None)
@given(st.recursive(st.none() | st.text() | st.integers(), lambda of: st.lists(of) | st.dictionaries(st.text(), of)))
def test_no_json_breaks_the_reading_of_a_set(document: object) -> None:
    for whole in (document, {"keys": document}, {"keys": [document]}, {"keys": [{"kty": "RSA", "n": document}]}):
        with pytest.raises(ValueError, match=r"JSON Web Key Set|can check a signature"):
            public_keys(json.dumps(whole).encode())
